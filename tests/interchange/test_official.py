"""Official checkpoints: sorted, noted and converted; written by real TensorFlow where installed."""

import numpy as np
import pytest
from made_up import SMALL, assert_bit_equal, random_params

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy
from ddpm_jax.interchange import official, parameter_names


def as_lazy(array):
    array = np.asarray(array)
    return Lazy(array.shape, array.dtype, lambda: np.array(array))


def open_made_up(monkeypatch, variables, name="model.ckpt-12"):
    monkeypatch.setattr(official, "find_prefix", lambda path: name)
    monkeypatch.setattr(official, "open_bundle",
                        lambda prefix: {k: as_lazy(v) for k, v in variables.items()})
    return official.open_official(name)


def parts(*suffixes):
    plain = parameter_names.variables_from_params(random_params(SMALL), SMALL)
    return {k + s: v + np.float32(i) for i, s in enumerate(suffixes) for k, v in plain.items()}


def test_all_parts_arrive_under_their_names(monkeypatch):
    stored = parts("", parameter_names.EMA_SUFFIX, "/Adam", "/Adam_1")
    found = open_made_up(monkeypatch, {**stored, "global_step": np.int64(7),
                                       "beta1_power": np.float32(0.1)})
    assert found.step == 7 and found.notes == []
    for i, part in enumerate((found.params, found.ema_params, found.mu, found.nu)):
        ours = parameter_names.params_from_variables(part, SMALL)
        np.testing.assert_array_equal(ours["conv_in"]["bias"],
                                      random_params(SMALL)["conv_in"]["bias"] + np.float32(i))


def test_what_is_absent_is_said(monkeypatch):
    found = open_made_up(monkeypatch, {**parts(""), "stray": np.zeros(2)})
    notes = "; ".join(found.notes)
    assert found.step == 12 and found.ema_params is found.params and found.mu == {}
    for word in ("no global_step", "ignored, not the model's: stray", "no EMA weights",
                 "no Adam slots"):
        assert word in notes
    found = open_made_up(monkeypatch, parts(parameter_names.EMA_SUFFIX), "model.ckpt")
    assert found.step == 0 and any("no raw weights" in n for n in found.notes)


def test_someone_elses_checkpoint(monkeypatch):
    with pytest.raises(UserError, match="no variable named model/"):
        open_made_up(monkeypatch, {"generator/w": np.zeros(2), "global_step": np.int64(1)})


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_real_tensorflow(tmp_path):
    pytest.importorskip("tensorflow")
    from made_up_tf import write_checkpoint
    params = random_params(SMALL)
    prefix, held = write_checkpoint(tmp_path, SMALL, params, step=790,
                                    extra={"other/thing": np.float32([1.0])})
    found = official.open_official(tmp_path)  # by the text file "checkpoint"
    assert found.prefix == prefix and found.step == 790
    assert found.notes == ["ignored, not the model's: other/thing"]
    for part, suffix in ((found.params, ""), (found.ema_params, parameter_names.EMA_SUFFIX),
                         (found.mu, "/Adam"), (found.nu, "/Adam_1")):
        ours = parameter_names.params_from_variables(part, SMALL)
        back = parameter_names.variables_from_params(ours, SMALL)
        assert_bit_equal(back, {k: held[k + suffix] for k in back})
    moved = parameter_names.params_from_variables(found.params, SMALL)
    assert not np.array_equal(moved["conv_in"]["kernel"], params["conv_in"]["kernel"])


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_official_names_mean_what_the_paper_means_by_them():
    """Ours against the net built a second time, in TensorFlow, from the official scopes alone."""
    pytest.importorskip("tensorflow")
    import jax
    from made_up_tf import official_eps

    params = random_params(SMALL)
    variables = parameter_names.variables_from_params(params, SMALL)
    x = np.random.default_rng(1).standard_normal((2, 16, 16, 3)).astype(np.float32)
    t = np.array([7, 940], np.int32)
    theirs = official_eps(variables, SMALL, x, t, groups=8)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(SMALL.apply)({"params": params}, x, t)
    assert 0.1 < np.abs(theirs).max() < 10
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
