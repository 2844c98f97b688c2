import json
import os
import pathlib
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ddpm_jax import checkpoints as C
from ddpm_jax.errors import UserError
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.steps import TrainState, init_state

TX = make_optimizer(learning_rate=1e-3, warmup_steps=2, b1=0.9, b2=0.999, eps=1e-8,
                    eps_rule="tensorflow")


def state(seed=0):
    rng = np.random.default_rng(seed)
    s = init_state({"a": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32),
                    "b": {"c": jnp.asarray(rng.standard_normal(2), jnp.float32)}}, TX)
    return s._replace(step=jnp.int32(seed), ema_params=jax.tree.map(lambda x: x + 1, s.params))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def saved(folder, steps, **kwargs):
    store = C.Checkpoints(folder, **kwargs)
    for step in steps:
        store.save(step, state(step), {"step": step})
    store.wait()
    return store


def test_round_trip_is_bit_equal(tmp_path):
    store = saved(tmp_path, [5])
    restored = store.restore(5, jax.eval_shape(state))
    assert isinstance(restored, TrainState)
    equal(restored, state(5))
    for ema in (True, False):
        params, step = store.restore_weights(None, jax.eval_shape(state).params, ema=ema)
        equal(params, state(5).ema_params if ema else state(5).params)
        assert step == 5
    store.close()


def test_a_save_survives_what_the_next_step_does_to_the_buffers(tmp_path):
    store = C.Checkpoints(tmp_path)
    s = state(1)
    store.save(1, s, {})
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    for _ in range(3):
        s = overwrite(s)
    store.wait()
    equal(store.restore(1, jax.eval_shape(state)), state(1))
    store.close()


def test_latest_multiples_and_best_are_kept(tmp_path):
    store = C.Checkpoints(tmp_path, keep=2, keep_every=4, best="bpd")
    for step, bpd in zip(range(1, 8), [9, 8, 1, 7, 6, 5, 4], strict=True):
        store.save(step, state(step), {})
        store.scored(step, {"bpd": bpd})
    store.wait()
    assert store.steps() == [3, 4, 6, 7] and store.latest() == 7
    store.close()


def test_scores_outlive_the_process_and_may_be_nan(tmp_path):
    store = C.Checkpoints(tmp_path, keep=1, best="bpd")
    for step, bpd in ((1, float("nan")), (2, 5.0), (3, 6.0)):
        store.save(step, state(step), {})
        store.scored(step, {"bpd": bpd})
    store.scored(9, {"bpd": 0.0})  # a step that the death of the process undoes
    store.wait()
    store.close()
    store = C.Checkpoints(tmp_path, keep=1, best="bpd")
    assert sorted(store.scores) == [1, 2, 3]
    for step in (4, 5):
        store.save(step, state(step), {})
    store.wait()
    assert store.steps() == [2, 5]
    store.close()
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(UserError, match="scores.json is damaged .* delete it"):
        C.Checkpoints(tmp_path, best="bpd")


def test_scores_that_cannot_be_written_end_nothing(tmp_path, caplog):
    store = C.Checkpoints(tmp_path, best="bpd")
    store.save(1, state(1), {})
    (tmp_path / "scores.json").mkdir()
    store.scored(1, {"bpd": 2.0})
    assert "the run continues" in caplog.text
    (tmp_path / "scores.json").rmdir()
    store.scored(2, {"bpd": 1.0})
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"1", "2"}
    store.close()


def test_another_device_count_reads_it(tmp_path):
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(jax.devices()), ("data",)), jax.sharding.PartitionSpec())
    saved(tmp_path, [3]).close()
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                        jax.eval_shape(state))
    store = C.Checkpoints(tmp_path, read_only=True)
    restored = store.restore(3, like)
    assert len(restored.params["a"].devices()) == 8
    equal(restored, state(3))
    store.close()


def test_a_save_of_arrays_on_all_devices_compiles_nothing(tmp_path, caplog):
    whole = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(jax.devices()), ("data",)), jax.sharding.PartitionSpec())
    placed = jax.device_put(init_state({"w": np.ones((8, 41), np.float32)}, TX), whole)
    store = C.Checkpoints(tmp_path)
    with jax.log_compiles():
        store.save(3, placed, {})
    assert "Compiling" not in caplog.text
    equal(store.restore(3, placed), placed)
    assert len(store.restore(3, placed).params["w"].devices()) == 8
    store.close()


def test_no_checkpoint_and_no_such_step(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        C.Checkpoints(tmp_path).find(None)
    store = saved(tmp_path, [2, 4])
    with pytest.raises(UserError, match="--step=3: no such checkpoint .* there are 2, 4"):
        store.find(3)
    store.close()


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    saved(tmp_path, [2, 4]).close()
    for file in (tmp_path / "checkpoints" / "4" / "ema_params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.unlink() if damage == "delete" else os.truncate(file, 10)
    store = C.Checkpoints(tmp_path, read_only=True)
    with pytest.raises(UserError, match=r"checkpoint 4 .* cannot be read.*there are: \[2\]"):
        store.restore_weights(None, jax.eval_shape(state).params, ema=True)
    equal(store.restore_weights(2, jax.eval_shape(state).params, ema=True)[0], state(2).ema_params)
    store.close()


def test_many_failed_reads_are_one_error(tmp_path):
    """pytest turns a traceback that TensorStore's late answers print into a failure."""
    wide = init_state({f"w{i}": jnp.full((8, 8), i, jnp.float32) for i in range(200)}, TX)
    store = C.Checkpoints(tmp_path)
    store.save(1, wide, {})
    store.close()
    for item in ("params", "ema_params", "training"):
        (tmp_path / "checkpoints" / "1" / item / "manifest.ocdbt").unlink()
    for _ in range(3):
        store = C.Checkpoints(tmp_path, read_only=True)
        with pytest.raises(UserError, match="checkpoint 1 .* cannot be read"):
            store.restore(1, wide)
        store.close()


@pytest.mark.parametrize("name", ["run [2e-4]", "a*b", "what?", "[", "*", "{x}", "ümlaut %s 'q'"])
def test_any_name_of_a_folder(tmp_path, name):
    saved(tmp_path / name, [3]).close()
    store = C.Checkpoints(tmp_path / name, read_only=True)
    equal(store.restore(3, jax.eval_shape(state)), state(3))
    store.close()


def test_a_path_that_cannot_be_saved_to_fails_at_once(tmp_path):
    store = C.Checkpoints(tmp_path)
    store.try_path()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
    store.close()
    store = C.Checkpoints(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(UserError, match="is not UTF-8"):
        store.try_path()
    store.close()


def test_a_save_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    """Without _Literal, Orbax merges nothing in such a folder, and raises nothing."""
    monkeypatch.setattr(C, "_Literal", epath.Path)
    with pytest.raises(UserError, match="checkpoint 3 .* cannot be read"):
        saved(tmp_path / "run [2e-4]", [3])


def test_what_is_saved_is_compared_bit_for_bit():
    a = np.array([1.0, np.nan, 3.0], np.float32)
    assert C._same(jnp.asarray(a), a) and C._same(np.float32(2), np.float32(2))
    assert not C._same(a, a[:2]) and not C._same(a, a.astype(np.float64))
    assert not C._same(a, np.nextafter(a, np.float32(9)))


def test_all_parts_of_a_state_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(C, "PART_BYTES", 40)  # several parts an item
    compared = []
    monkeypatch.setattr(C, "_same", lambda written, read, same=C._same: (
        compared.append(written) or same(written, read)))
    saved(tmp_path, [3]).close()
    assert sorted(np.asarray(x).tobytes() for x in compared) == sorted(
        np.asarray(x).tobytes() for x in jax.tree.leaves(C._items(state(3))))
    monkeypatch.setattr(C, "_same", lambda written, read: np.asarray(written).ndim < 2)
    with pytest.raises(UserError, match="params read back differently"):
        saved(tmp_path / "other", [3])


def test_the_data_of_an_unmerged_save_are_merged_as_the_page_describes(tmp_path, monkeypatch):
    saved(tmp_path, [3]).close()
    folder = tmp_path / "checkpoints" / "3"
    for item in ("params", "ema_params", "training"):  # what the bracket bug left behind
        (folder / item / "manifest.ocdbt").unlink()
        shutil.rmtree(folder / item / "d")
    page = (pathlib.Path(__file__).parents[1] / "launch" / "TROUBLESHOOTING.md").read_text()
    code, = re.findall(r"```python\n(.*?merge_ocdbt.*?)```", page, re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["merge.py", str(folder)])
    exec(compile(code, "TROUBLESHOOTING.md", "exec"), {})
    store = C.Checkpoints(tmp_path, read_only=True)
    equal(store.restore(3, jax.eval_shape(state)), state(3))
    store.close()


@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("a small disk needs root and mount")
    import subprocess
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        big = lambda step: state(step)._replace(  # noqa: E731
            params={"a": jnp.asarray(np.random.default_rng(step).standard_normal(500_000),
                                     jnp.float32)})
        store = C.Checkpoints(disk, keep=5)
        store.save(1, big(1), {})
        store.wait()
        with pytest.raises(UserError, match="No space left.*last good checkpoint is step"):
            for step in (2, 3, 4):
                store.save(step, big(step), {})
                store.wait()
        again = C.Checkpoints(disk, read_only=True)
        assert again.latest() == step - 1
        equal(again.restore(step - 1, jax.eval_shape(lambda: big(1))), big(step - 1))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


CONFIG = {"seed": 0, "train": {"steps": 10, "batch_size": 4}, "model": {"ch_mult": [1, 2]},
          "parallel": {"runner": "jit"}}


def test_a_failed_start_claims_nothing(tmp_path):
    assert C.claim(tmp_path, CONFIG) == []
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir(parents=True)  # cut off
    assert C.claim(tmp_path, CONFIG | {"seed": 1}) == ["seed: 0 -> 1"]
    assert C.read_config(tmp_path)["seed"] == 1


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/10"])
def test_a_folder_inside_a_run_names_the_run(tmp_path, inside):
    C.claim(tmp_path, CONFIG)
    (tmp_path / inside).mkdir(parents=True)
    with pytest.raises(UserError, match=f"inside the run {tmp_path}: give --workdir={tmp_path}$"):
        C.claim(tmp_path / inside, CONFIG)


def test_other_images_are_refused_the_same_at_another_place_are_not(tmp_path):
    a, b, c = ({"train": name} for name in "abc")
    C.claim_data(tmp_path, a, resumed=False)
    C.claim_data(tmp_path, b, resumed=False)  # nothing was trained on them yet
    C.claim_data(tmp_path, b, resumed=True)
    with pytest.raises(UserError, match="other images .fingerprint b; now c.*delete .*data.json"):
        C.claim_data(tmp_path, c, resumed=True)
    (tmp_path / "data.json").unlink()  # as the message says; so are runs of older versions
    C.claim_data(tmp_path, c, resumed=True)
    with pytest.raises(UserError):
        C.claim_data(tmp_path, b, resumed=True)


def test_a_run_copied_to_a_bucket_without_marks_is_resumed(tmp_path, storage):
    saved(tmp_path, [2, 4]).close()
    there = epath.Path(f"{storage}/copied")
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.name != "commit_success.txt":
            target = there / file.relative_to(tmp_path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    cut = there / "checkpoints" / "6" / "_CHECKPOINT_METADATA"  # a save that was cut off there
    content = json.loads((there / "checkpoints" / "4" / "_CHECKPOINT_METADATA").read_text())
    cut.parent.mkdir(parents=True, exist_ok=True)
    cut.write_text(json.dumps(content | {"commit_timestamp_nsecs": None}))
    store = C.Checkpoints(there)
    assert store.steps() == [2, 4]
    equal(store.restore(4, jax.eval_shape(state)), state(4))
    store.close()


def test_claim_refuses_another_config_and_names_the_fields(tmp_path):
    C.claim(tmp_path / "run", CONFIG)
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    assert C.read_config(tmp_path / "run") == CONFIG
    C.claim(tmp_path / "run", CONFIG | {"train": {"steps": 99, "batch_size": 4},
                                        "parallel": {"runner": "pmap"}})
    assert C.read_config(tmp_path / "run")["train"]["steps"] == 99
    with pytest.raises(UserError, match=r"seed: 0 -> 1; train.batch_size: 4 -> 8"):
        C.claim(tmp_path / "run", CONFIG | {"seed": 1, "train": {"steps": 1, "batch_size": 8}})
    assert C.read_config(tmp_path / "run")["train"]["steps"] == 99


def test_claim_refuses_foreign_folders(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="has checkpoints but no config.json"):
        C.claim(tmp_path, CONFIG)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot write to --workdir"):
        C.claim(file / "run", CONFIG)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps(CONFIG)[:20])
    with pytest.raises(UserError, match="config.json is damaged"):
        C.claim(tmp_path / "broken", CONFIG)
