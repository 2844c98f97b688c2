import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_jax.diffusion import schedule as S

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "schedule.json").read_text())


def test_tables_match_sixty_digit_arithmetic():
    tables = S.tables64(S.linear(1000, 1e-4, 0.02))
    for t, row in GOLDEN.items():
        for name, value in row.items():
            # 1 - alphas_cumprod loses digits near t = 0: relative to 1e-4, the first beta
            np.testing.assert_allclose(
                tables[name][int(t)], float(value), rtol=3e-12, atol=1e-17, err_msg=f"{name}[{t}]")


def test_float32_tables_are_the_rounded_float64_ones():
    betas = S.linear(1000)
    tables, schedule = S.tables64(betas), S.make_schedule(betas)
    for name, values in tables.items():
        np.testing.assert_array_equal(getattr(schedule, name), values.astype(np.float32))
    assert float(schedule.posterior_mean_coef1[0]) == 1.0
    assert float(schedule.posterior_mean_coef2[0]) == 0.0


def test_rules_for_the_first_log_variance():
    betas = S.linear(1000)
    cifar, large = S.tables64(betas, "next"), S.tables64(betas, "floor")
    # paper.md's figures: posterior variance at t=1 is 5.453e-5, its log -9.817; log beta_0 -9.210
    assert cifar["posterior_log_variance"][0] == pytest.approx(-9.817, abs=1e-3)
    assert cifar["fixed_large_log_variance"][0] == pytest.approx(-9.817, abs=1e-3)
    assert large["posterior_log_variance"][0] == pytest.approx(np.log(1e-20))
    assert large["fixed_large_log_variance"][0] == pytest.approx(-9.2103, abs=1e-3)
    for name in ("posterior_log_variance", "fixed_large_log_variance"):
        np.testing.assert_array_equal(cifar[name][1:], large[name][1:])
    np.testing.assert_allclose(cifar["fixed_large_log_variance"][1:], np.log(betas[1:]))


@pytest.mark.parametrize("name", S.BETAS)
@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 1000])
def test_every_law_gives_finite_tables(name, num_timesteps):
    needs = {"listed": {"betas": (0.5,) * num_timesteps}}
    betas = S.BETAS[name](num_timesteps, **needs.get(name, {}))
    assert betas.dtype == np.float64 and betas.shape == (num_timesteps,)
    schedule = S.make_schedule(betas)
    for field, values in schedule._asdict().items():
        if name == "jsd" and field == "log_one_minus_alphas_cumprod":
            continue
        assert np.isfinite(values).all(), (name, field)


def test_laws_at_their_ends():
    assert S.linear(1000)[[0, -1]] == pytest.approx([1e-4, 0.02])
    assert S.quad(1001)[500] == pytest.approx(((1e-4**0.5 + 0.02**0.5) / 2) ** 2)
    assert S.jsd(4) == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])
    ten, fifty = S.warmup10(1000), S.warmup50(1000)
    assert ten[[0, 99, 100]] == pytest.approx([1e-4, 0.02, 0.02]) and ten[50] < 0.02
    assert fifty[[0, 499, 500]] == pytest.approx([1e-4, 0.02, 0.02]) and fifty[498] < 0.02
    half = np.cumprod(1 - S.cosine(1000))[499]
    f = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    assert half == pytest.approx(f(0.5) / f(0.0))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_respacing_keeps_alphas_cumprod_at_the_visited_steps(data):
    total = data.draw(st.integers(1, 300))
    steps = data.draw(st.integers(1, total))
    visited = S.evenly_spaced(total, steps)
    assert len(visited) == steps and visited[-1] == total - 1
    betas = S.linear(total)
    respaced = S.tables64(S.respace(betas, visited))
    np.testing.assert_allclose(
        respaced["alphas_cumprod"], S.tables64(betas)["alphas_cumprod"][visited], rtol=1e-10)


def test_bad_input_is_refused():
    for betas in ([], [0.0, 0.1], [0.1, 1.5], [[0.1]]):
        with pytest.raises(ValueError, match="betas"):
            S.tables64(betas)
    with pytest.raises(ValueError, match="11 sampling steps"):
        S.evenly_spaced(10, 11)
    with pytest.raises(ValueError, match="rise strictly"):
        S.respace(S.linear(10), [3, 3])
    with pytest.raises(ValueError, match="2 timesteps for 3 betas"):
        S.make_schedule(S.linear(3), [0, 1])


def test_zero_terminal_snr_keeps_the_start_and_ends_in_noise():
    betas = S.linear(1000)
    changed = S.zero_terminal_snr(betas)
    bar, was = np.cumprod(1 - changed), np.cumprod(1 - betas)
    assert changed[-1] == 1.0 and bar[-1] == 0.0 and changed[0] == pytest.approx(betas[0])
    assert ((changed > 0) & (changed <= 1)).all() and (bar <= was + 1e-12).all()
    assert all(np.isfinite(np.asarray(table)).all() for table in S.make_schedule(changed))
