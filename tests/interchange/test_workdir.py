"""An imported model is a run like any other."""

import jax
import numpy as np
import pytest
from made_up import SMALL, assert_bit_equal, random_params, small_config

from ddpm_jax import checkpoints, experiment
from ddpm_jax.config import to_json
from ddpm_jax.errors import UserError
from ddpm_jax.interchange import workdir

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def write(folder, facts=None):
    exp = experiment.build_model(small_config(), jax.devices()[:1])
    moments = {"mu": random_params(SMALL, 2), "nu": random_params(SMALL, 3)}
    state = workdir.training_state(exp, 12, random_params(SMALL), random_params(SMALL, 1), moments)
    workdir.write_run(folder, exp, state, facts or {"origin": "x"})
    return exp, state


def test_the_optimizers_state_is_filled(tmp_path):
    exp, state = write(tmp_path / "run")
    adam, warmup = state.opt_state
    assert adam.count == 12 and warmup.count == 12
    assert_bit_equal(adam.mu, random_params(SMALL, 2))
    assert_bit_equal(adam.nu, random_params(SMALL, 3))
    fresh = workdir.training_state(exp, 5, {}, {}).opt_state
    assert fresh[0].count == 5 and not any(x.any() for x in jax.tree.leaves(fresh[0].mu))
    want = experiment.build_training(exp).abstract_state.opt_state
    assert jax.tree.structure(fresh) == jax.tree.structure(want)


@pytest.mark.parametrize("name", ["run", "run [2e-4] *"])
def test_reads_back_as_a_training_state_bit_for_bit(tmp_path, name):
    exp, wrote = write(tmp_path / name)
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
        "checkpoints", "config.json", "import.json"]
    store = checkpoints.Checkpoints(tmp_path / name)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                        experiment.build_training(exp).abstract_state)
    state = store.restore(store.find(None), like)
    store.close()
    assert int(state.step) == 12 and state.step.dtype == np.int32
    assert_bit_equal(jax.tree.map(np.asarray, state.params), wrote.params)
    assert_bit_equal(jax.tree.map(np.asarray, state.ema_params), wrote.ema_params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, wrote.opt_state)
    assert checkpoints.read_config(tmp_path / name) == to_json(small_config())
    assert workdir.read_facts(tmp_path / name) == {"origin": "x"}


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    for call in (lambda: workdir.check_free(tmp_path / "run"), lambda: write(tmp_path / "run")):
        with pytest.raises(UserError, match="not an empty folder"):
            call()
    with pytest.raises(TypeError):
        write(tmp_path / "other", facts={"not json": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert workdir.read_facts(tmp_path / "run") == {}
