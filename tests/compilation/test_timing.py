import time

import jax
import pytest

from ddpm_jax.compilation import timing


def test_rounds_take_turns_and_stop():
    order = []
    times = timing.rounds({"a": lambda: order.append("a"), "b": lambda: order.append("b")},
                          repeats=4, seconds=60)
    assert order == list("abababab") and len(times["a"]) == len(times["b"]) == 4
    times = timing.rounds({"slow": lambda: time.sleep(0.02)}, repeats=100, seconds=0.0)
    assert len(times["slow"]) == 3 and min(times["slow"]) >= 0.02


def test_ratios_are_of_each_round():
    found = timing.ratios([4.0, 9.0, 30.0], [2.0, 3.0, 3.0])
    assert found == timing.Times(3.0, 2.0, 10.0, 3)


def test_a_row_has_mfu_only_where_the_peak_is_known():
    class Device:
        device_kind = "TPU v3"

    times = timing.Times(0.5, 0.4, 0.6, 5)
    row = timing.result("step", name="x", times=times, images=128, flops=61.5e12 * 2,
                        devices=[Device()] * 8)
    assert row["mfu"] == pytest.approx(0.5) and row["images_per_s"] == 256
    unknown = timing.result("step", name="y", times=times, images=128, flops=1e12,
                            devices=jax.devices())
    assert unknown["mfu"] is None
    text = timing.render([row, unknown])
    assert "50.0%" in text and "n/a" in text and "400.00 ... 600.00" in text
