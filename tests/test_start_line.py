import pathlib

import jax
import pytest
from tiny_run import config

from ddpm_jax import start_line
from ddpm_jax.compilation.roofline import unet_work
from ddpm_jax.experiment import build_model


def model(devices=1, **fields):
    return build_model(config(**fields), jax.devices()[:devices])


@pytest.mark.parametrize("devices, fields, expected", [
    (1, {"train.clip_scope": "global"},
     "1 x cpu (shard_map); float32; clip 1 of the whole batch; 8 images a device; "
     "speed unmeasured here"),
    (8, {"train.clip_scope": "per_replica", "train.clip_norm": 0.5, "parallel.runner": "jit"},
     "8 x cpu (jit); float32; clip 0.5 of 8 parts; 1 images a device; speed unmeasured here"),
    (2, {"train.clip_norm": 0.0, "model.dtype": "bfloat16"},
     "2 x cpu (shard_map); bfloat16; no clip; 4 images a device; speed unmeasured here"),
])
def test_what_was_chosen(devices, fields, expected):
    assert start_line.training_line(model(devices, **fields)) == expected


def test_what_would_be_faster():
    line = start_line.training_line(model(2, **{"train.clip_scope": "per_replica"}))
    assert line.count("faster: ") == 1 and "--config.train.clip_scope=global (" in line
    with jax.default_matmul_precision("bfloat16"):
        assert "float32 (products in bfloat16)" in start_line.sampling_line(model(), 1000, 8)


def test_a_faster_type_is_named_with_its_factor(monkeypatch):
    monkeypatch.setitem(start_line._FASTER_DTYPES, ("cpu", "float32"), "the flag (2 x)")
    fields = {"train.clip_scope": "global"}
    assert start_line.training_line(model(**fields)).endswith("; faster: the flag (2 x)")
    other = model(**fields, **{"model.dtype": "bfloat16"})
    assert "faster" not in start_line.training_line(other)


def test_kernels_are_named_where_they_could_run_and_none_is_chosen(monkeypatch):
    monkeypatch.setitem(start_line._FASTER_KERNELS, ("cpu", "float32"), "the flag (2 x)")
    fields = {"train.clip_scope": "global"}
    assert start_line.training_line(model(**fields)).endswith("; faster: the flag (2 x)")
    assert start_line.sampling_line(model(), 1000, 8).endswith("; faster: the flag (2 x)")
    cut = model(2, **fields, **{"parallel.runner": "jit"})
    chosen = model(**fields)
    chosen = chosen._replace(model=chosen.model.clone(norm_form="triton"))
    assert all("faster" not in start_line.training_line(exp) for exp in (cut, chosen))


def test_a_measured_machine_is_matched_by_network_type_clip_and_images(monkeypatch):
    exp = model(**{"train.clip_scope": "global"})
    row = start_line.Measured("cpu", unet_work(exp.model).parameters, "float32",
                              exp.model.norm_form, "xla", "global", 8, 4321)
    monkeypatch.setattr(start_line, "MEASURED", (*start_line.MEASURED, row))
    assert "; 4,321 images/s measured" in start_line.training_line(exp)
    for other in (model(2, **{"train.clip_scope": "global"}), model(**{"model.ch": 8}),
                  model(**{"train.batch_size": 16}), model(**{"train.clip_scope": "per_replica"}),
                  model(**{"model.dtype": "bfloat16"})):
        assert "unmeasured here" in start_line.training_line(other)
    assert "unmeasured here" in start_line.sampling_line(exp, 10, 8)


def test_rows_are_those_of_the_page():
    page = (pathlib.Path(__file__).parents[1] / "docs/h100.md").read_text()
    assert all(f" {row.images_per_second:,} " in page for row in start_line.MEASURED)
