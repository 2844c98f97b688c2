"""Whole runs on the embedded digits: train, be cut off, go on."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_run import Stop, Watchdog, config, train

from ddpm_jax import checkpoints, experiment
from ddpm_jax import train as training
from ddpm_jax.compilation.cache import count_compilations
from ddpm_jax.config import from_json, to_json
from ddpm_jax.errors import UserError
from ddpm_jax.run_log import read_metrics
from ddpm_jax.storage.lock import Lock

# A save takes a second of a test.
AT_THE_END = {"checkpoint.every": 100}


def final(workdir):
    exp = experiment.build_model(config())
    store = checkpoints.Checkpoints(workdir, read_only=True)
    state = store.restore(store.latest(), experiment.build_training(exp).abstract_state)
    store.close()
    return jax.tree.map(np.asarray, state)


def test_a_run_leaves_what_a_person_looks_for(straight):
    lines = read_metrics(straight / "metrics.jsonl")
    assert [r["step"] for r in lines] == [2, 4, 6, 8, 10, 12]
    assert {"loss", "grad_norm", "learning_rate", "images_per_second"} <= set(lines[0])
    assert lines[0]["learning_rate"] == pytest.approx(1e-3 * 1 / 100)
    assert (straight / "loss.png").stat().st_size > 1000
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["12", "8"]


@pytest.mark.parametrize("cut", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_run_cut_off_and_continued_is_bit_equal(straight, tmp_path, cut, capsys):
    assert train(tmp_path, at=cut, **AT_THE_END) is False
    assert train(tmp_path, **AT_THE_END) is True
    assert f"resuming {tmp_path} from step {cut}" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, final(tmp_path), final(straight))
    steps = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 12


@pytest.mark.slow
@pytest.mark.parametrize("fields", [
    {"parallel.runner": "jit"}, {"parallel.runner": "pmap"}, {"data.resident": False},
])
def test_the_same_examples_and_weights_whatever_runs_them(straight, tmp_path, fields):
    with count_compilations() as programs:
        train(tmp_path, **AT_THE_END, **fields)
    # Under pmap it is one of several lambdas.
    assert sum("train_steps" in p.name for p in programs) == (
        "pmap" not in fields.values()), programs
    ours, theirs = (read_metrics(p / "metrics.jsonl") for p in (tmp_path, straight))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)


@pytest.mark.slow
def test_attention_that_no_level_has_is_refused_of_new_runs_alone(straight, tmp_path):
    attention = {"model.attn_resolutions": (16,)}
    with pytest.raises(UserError, match=r"config.model: attn_resolutions=\(16,\).*sides of 8 pix"):
        train(tmp_path / "run", **attention)
    assert not (tmp_path / "run").exists()
    shutil.copytree(straight, tmp_path / "run")  # without attention, as older versions made it
    path = tmp_path / "run" / "config.json"
    stored = json.loads(path.read_text())
    stored["model"]["attn_resolutions"] = [16]
    path.write_text(json.dumps(stored))
    assert train(tmp_path / "run", **{"train.steps": 13, **attention}) is True


@pytest.mark.slow
def test_extending_is_allowed_changing_is_not(straight, tmp_path):
    train(tmp_path, **{"train.steps": 4})
    with pytest.raises(UserError, match="model.ch: 4 -> 8"):
        train(tmp_path, **{"model.ch": 8})
    train(tmp_path, **AT_THE_END, **{"train.steps": 12, "parallel.runner": "shard_map"})
    jax.tree.map(np.testing.assert_array_equal, final(tmp_path), final(straight))


def test_nothing_left_to_train(straight, capsys):
    assert train(straight)
    assert "nothing to train (raise --config.train.steps" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_saves_what_was_trained_before_it(straight, tmp_path):
    def evaluate(exp, params, step):
        raise UserError("no such metric")

    c = config(**{"eval.every": 7, **AT_THE_END})
    with pytest.raises(UserError, match="no such metric"):
        training.train(c, tmp_path, stop=Stop(), watchdog=Watchdog(), evaluate=evaluate)
    store = checkpoints.Checkpoints(tmp_path, read_only=True)
    assert store.steps() == [7]
    store.close()
    assert train(tmp_path, **AT_THE_END)
    jax.tree.map(np.testing.assert_array_equal, final(tmp_path), final(straight))


def test_what_would_end_an_evaluation_is_refused_before_the_first_step(tmp_path):
    from ddpm_jax.evaluation import monitor

    for fields, message in (
            ({"eval.best": "nosuch"}, "config.eval.best=nosuch"),
            ({"eval.metrics": "fdi"}, "config.eval.metrics=fdi"),
            ({"eval.num": 1, "eval.metrics": "offline"}, "config.eval.num")):
        with pytest.raises(UserError, match=message):
            training.train(config(**{"eval.every": 4, "eval.metrics": "bpd", **fields}), tmp_path,
                           stop=Stop(), watchdog=Watchdog(), check=monitor.check,
                           evaluate=monitor.periodic())
    assert not any((tmp_path / "checkpoints").iterdir())


def test_a_failed_start_leaves_the_folder_to_the_corrected_command(tmp_path, capsys):
    """One that failed at the data leaves nothing at all; a later one, config.json."""
    with pytest.raises(UserError):
        train(tmp_path / "new", **{"data.channels": 3})
    assert list(tmp_path.iterdir()) == []
    checkpoints.claim(tmp_path, to_json(config(**{"data.channels": 3})))
    assert train(tmp_path, **{"train.steps": 3, "train.log_every": 100})
    printed = capsys.readouterr().err
    assert "takes the new config (data.channels: 3 -> 1" in printed
    assert f"{tmp_path}/: metrics.jsonl, loss.png\n" in printed  # and no samples
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [3]


def test_two_commands_do_not_share_a_run(straight, monkeypatch):
    monkeypatch.setattr("ddpm_jax.storage.lock.GRACE_S", 0.0)
    lock = Lock(straight, "--workdir")
    with pytest.raises(UserError, match="--workdir=.* is in use by process"):
        train(straight)
    lock.release()


def test_other_images_are_not_trained_on(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "data.json").write_text('{"train": "0123456789abcdef"}')
    with pytest.raises(UserError, match="was trained on other images .fingerprint 0123456789abcd"):
        train(tmp_path / "run", **{"train.steps": 13})


def test_a_folder_inside_a_run_is_left_alone(straight):
    with pytest.raises(UserError, match=f"give --workdir={straight}"):
        train(straight / "checkpoints")
    assert not (straight / "checkpoints" / "lock.json").exists()


def test_data_that_does_not_fit(tmp_path):
    with pytest.raises(UserError, match="ddpm data prepare --name=cifar10"):
        train(tmp_path / "a", **{"data.name": "cifar10", "data.dir": str(tmp_path)})
    with pytest.raises(UserError):
        train(tmp_path / "b", **{"data.channels": 3})


@pytest.mark.slow
def test_a_diverging_run_stops_and_keeps_the_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"(loss|grad_norm) is (nan|inf) at step"):
        train(tmp_path, **{"optimizer.learning_rate": 1e36, "optimizer.warmup_steps": 0,
                           "train.clip_norm": 0.0, "checkpoint.every": 1})
    store = checkpoints.Checkpoints(tmp_path, read_only=True)
    if store.steps():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(final(tmp_path).params))
    store.close()


@pytest.mark.slow
def test_the_loop_compiles_once(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    with count_compilations() as programs:
        train(tmp_path / "run", **{"train.steps": 16, "checkpoint.every": 3})  # of 3 steps and of 1
    steps = [p for p in programs if "train_steps" in p.name]
    assert len(steps) == 1, steps


@pytest.mark.slow
def test_best_checkpoint_by_metric(tmp_path):
    scores = iter([3.0, 1.0, 2.0])

    def evaluate(exp, params, step):
        return {"bpd": next(scores)}

    c = config(**{"eval.every": 4, "eval.best": "bpd", "checkpoint.keep": 1})
    training.train(c, tmp_path, stop=Stop(), watchdog=Watchdog(), evaluate=evaluate)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["12", "8"]
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "bpd" in r]
    assert [r["bpd"] for r in rows] == [3.0, 1.0, 2.0]
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["eval"]["best"] == "bpd"


class Judge:
    """An evaluation that a signal cuts short at one step, the first time."""

    def __init__(self, stop, at):
        self.stop, self.at, self.steps = stop, at, []

    def __call__(self, exp, params, step):
        self.steps.append(step)
        if step == self.at:
            self.stop.at = 0  # from here on every poll says stop
        return None if self.stop.requested(step) else {"bpd": float(step)}


@pytest.mark.slow
@pytest.mark.parametrize("at, every", [(4, 4), (8, 4), (4, 8)])  # both due, at the end, no save
def test_an_evaluation_that_is_cut_short_is_done_at_the_restart(tmp_path, at, every):
    c = config(**{"train.steps": 8, "eval.every": 2, "eval.best": "bpd", "checkpoint.every": every})
    stop = Stop()
    judge = Judge(stop, at)
    assert not training.train(c, tmp_path, stop=stop, watchdog=Watchdog(), evaluate=judge)
    assert judge.steps == list(range(2, at + 1, 2))
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == at
    judge = Judge(Stop(), None)
    assert training.train(c, tmp_path, stop=judge.stop, watchdog=Watchdog(), evaluate=judge)
    assert judge.steps == list(range(at, 9, 2))
    rows = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if "bpd" in r]
    assert rows == [2, 4, 6, 8]
    again = Judge(Stop(), None)
    assert training.train(c, tmp_path, stop=again.stop, watchdog=Watchdog(), evaluate=again)
    assert again.steps == []


@pytest.mark.slow
def test_what_is_saved_before_an_evaluation_is_not_unsaved_during_it(tmp_path):
    """So that a signal in the middle of it need not wait for its end."""
    seen = []

    def evaluate(exp, params, step):
        seen.append((stop.history[-1], sorted(
            int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())[-1]))
        return {"bpd": 1.0}

    stop = Stop()
    c = config(**{"train.steps": 8, "eval.every": 4, "checkpoint.every": 4})
    training.train(c, tmp_path, stop=stop, watchdog=Watchdog(), evaluate=evaluate)
    assert seen == [(False, 4), (False, 8)]


def saved(workdir, step):
    exp = experiment.build_model(config())
    store = checkpoints.Checkpoints(workdir, read_only=True)
    state = store.restore(step, experiment.build_training(exp).abstract_state)
    store.close()
    return jax.tree.map(np.asarray, state)


def start_from(source, workdir, step=None, optimizer=False, **fields):
    return training.train(config(**fields), workdir, stop=Stop(), watchdog=Watchdog(),
                          init_from=training.InitFrom(str(source), step, optimizer))


@pytest.mark.slow
def test_a_new_run_starts_from_weights_and_average_of_another(straight, tmp_path, capsys):
    fields = {"optimizer.learning_rate": 1e-2, "checkpoint.keep": 5, "train.batch_size": 16,
              **AT_THE_END}
    assert start_from(straight, tmp_path, 8, **fields)
    assert f"starting from step 8 of {straight}" in capsys.readouterr().err
    old, new = saved(straight, 8), saved(tmp_path, 8)
    for part in ("step", "params", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, part), getattr(old, part))
    assert new.opt_state[0].count == 0 and old.opt_state[0].count == 8
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["init_from"] == {"workdir": str(straight), "step": 8, "optimizer": False}
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [10, 12]
    assert rows[0]["learning_rate"] == pytest.approx(1e-2 * 1 / 100)  # its second update
    # Resumed with or without the flag; the source stays on record.
    assert train(tmp_path, **fields, **{"train.steps": 14})
    assert start_from(straight, tmp_path, None, **fields, **{"train.steps": 14})
    assert json.loads((tmp_path / "config.json").read_text())["init_from"] == stored["init_from"]
    assert from_json(stored).to_dict() == config(**fields).to_dict()


@pytest.mark.slow
def test_with_the_optimizer_it_is_the_same_run(straight, tmp_path):
    assert start_from(straight, tmp_path, 8, True, **AT_THE_END)
    jax.tree.map(np.testing.assert_array_equal, final(tmp_path), final(straight))


def test_what_cannot_start_from_another_run(straight, tmp_path):
    with pytest.raises(UserError, match="--init_from=.*nothing: no run here"):
        start_from(tmp_path / "nothing", tmp_path / "a")
    with pytest.raises(UserError, match="no such checkpoint .* there are 8, 12"):
        start_from(straight, tmp_path / "b", 5)
    with pytest.raises(UserError, match="its network has other weights: model.ch: 4 -> 8; take"):
        start_from(straight, tmp_path / "c", **{"model.ch": 8})
    shutil.copytree(straight, tmp_path / "d")
    with pytest.raises(UserError, match="holds another run already; leave --init_from out"):
        start_from(straight, tmp_path / "d")
    with pytest.raises(UserError, match=f"another config: .*--init_from={straight} to continue"):
        train(straight, **{"optimizer.learning_rate": 1e-2})
