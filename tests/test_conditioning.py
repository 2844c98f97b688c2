"""A run with classes from the data to the samples; without them nothing is added to a program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import Stop, Watchdog, config, train, weights

from ddpm_jax import programs
from ddpm_jax import sample as sampling
from ddpm_jax import train as training
from ddpm_jax.cli.main import main
from ddpm_jax.diffusion.objective import WEIGHTS, mse_loss
from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import build_model, build_training
from ddpm_jax.interchange.workdir import training_state, write_run
from ddpm_jax.training import rng
from ddpm_jax.training.steps import Batch, to_unit_range

FIELDS = {"model.num_classes": 10, "train.steps": 4}


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A run of 4 steps, without the minutes of compiling them: its weights are made up."""
    folder = tmp_path_factory.mktemp("conditional")
    exp = build_model(config(**FIELDS), jax.devices()[:1])
    params = weights(exp.abstract_params)
    write_run(folder, exp, training_state(exp, 4, params, params), {})
    assert train(folder, **FIELDS)  # nothing is left to train, but the data is opened
    return folder


def drawn(workdir, out, **kwargs):
    assert sampling.sample(workdir, out, **{"num": 12, "batch_size": 16, **kwargs})
    with np.load(out / "samples.npz") as archive:
        return dict(archive)


@pytest.mark.parametrize("fields, options", [
    ({}, {}),
    ({"diffusion.predict": "v", "diffusion.weights.name": "min_snr", "diffusion.weights.gamma": 3.0,
      }, {"weights": functools.partial(WEIGHTS["min_snr"], gamma=3.0)})])
def test_without_classes_the_loss_is_that_of_the_network_alone(fields, options):
    """The same jaxpr, so the same program, as one written down without any condition."""
    exp = build_model(config(**{"model.dropout": 0.1, "diffusion.variance": "fixed_small",
                                "diffusion.loss": "mse"} | fields), jax.devices()[:1])
    batch = Batch(jax.ShapeDtypeStruct((4, *exp.image_shape), jnp.uint8))
    shapes = exp.model.dropout_shapes()
    draws = jax.eval_shape(lambda: rng.draw(
        rng.example_keys(jax.random.key(0), 0, jnp.arange(4)), image_shape=exp.image_shape,
        num_timesteps=10, dropout_shapes=shapes))

    def plain(params, batch, draws):
        return mse_loss(
            lambda x, t: exp.model.apply({"params": params}, x, t, draws.dropout_bits),
            exp.schedule, to_unit_range(batch.images), draws.t, draws.noise,
            predict=PARAMETERIZATIONS[exp.config.diffusion.predict],
            variance=VARIANCES["fixed_small"], **options).mean()

    ours, wanted = (jax.make_jaxpr(f)(exp.abstract_params, batch, draws)
                    for f in (build_training(exp).step.keywords["loss_fn"], plain))
    assert str(ours) == str(wanted)
    assert "class_embedding" not in exp.abstract_params


def test_labels_are_dropped_by_a_key_of_their_own():
    keys = rng.example_keys(jax.random.key(0), 5, jnp.arange(1000))
    settings = dict(image_shape=(1, 1, 1), num_timesteps=10, dropout_shapes=[(1, 1, 1)])
    without, some = rng.draw(keys, **settings), rng.draw(keys, **settings, label_dropout=0.3)
    assert without.drop_label is None and 0.25 < some.drop_label.mean() < 0.35
    jax.tree.map(np.testing.assert_array_equal, without, some._replace(drop_label=None))
    for other in (some.flip, some.t > 4, some.noise[:, 0, 0, 0] > 0):
        assert abs(np.corrcoef(some.drop_label, np.asarray(other))[0, 1]) < 0.1


@pytest.mark.parametrize("resident", [True, False])
def test_images_come_with_their_labels(resident):
    exp = build_model(config(**{**FIELDS, "data.resident": resident}), jax.devices()[:1])
    source, _ = training._open_data(exp, "train")
    batch = training._feeder(exp, source, 3, 2)(2)[0]
    images, labels = (np.asarray(x).reshape(-1, *shape) for x, shape in zip(
        batch, (exp.image_shape, ()), strict=True))
    assert len(images) == len(labels) == (len(source) if resident else 16)
    numbers = {source[i].tobytes(): source.labels[i] for i in range(len(source))}
    assert [numbers[image.tobytes()] for image in images] == labels.tolist()


@pytest.mark.slow
def test_an_image_depends_on_its_label(conditional, tmp_path):
    every = drawn(conditional, tmp_path / "every")
    np.testing.assert_array_equal(every["labels"], np.arange(12) % 10)
    three = drawn(conditional, tmp_path / "three", labels=["3"])
    assert (three["labels"] == 3).all()
    same = (every["arr_0"] == three["arr_0"]).all(axis=(1, 2, 3))
    assert same[3] and not same[[2, 4]].any()
    with pytest.raises(UserError, match="another request .labels: .3. -> None"):
        drawn(conditional, tmp_path / "three")


@pytest.mark.slow
def test_guided_samples_do_not_depend_on_the_runner():
    """And guidance 0 is the prediction without a label."""
    index, images = np.arange(8, dtype=np.int32), []
    for runner, devices, choices in (
            ("jit", 4, dict(guidance=2.0)), ("pmap", 2, dict(guidance=2.0)),
            ("shard_map", 1, dict(guidance=0.0)), ("shard_map", 1, dict(labels=(10,)))):
        exp = build_model(config(**{**FIELDS, "parallel.runner": runner}), jax.devices()[:devices])
        chain = programs.sampling_chain(exp, steps=2, **choices)
        params = exp.runner.put("replicated", weights(exp.abstract_params))
        images.append(exp.runner.local(programs.sample_program(exp, chain)(
            params, np.uint32(0), exp.runner.put("batch", index))).astype(int))
    one, two, zero, none = images
    assert np.abs(one - two).max() <= 1 and np.abs(zero - none).max() <= 1
    assert np.abs(one - zero).max() > 1


def test_what_needs_labels_or_has_too_many_is_one_line(conditional, straight, tmp_path, capsys):
    for kwargs, message in ((dict(guidance=2.0), "guidance=2.0 needs labels.*num_classes=0"),
                            (dict(labels=["1"]), "label 1: this model has no classes")):
        with pytest.raises(UserError, match=message):
            sampling.sample(straight, tmp_path / "out", num=1, **kwargs)
    with pytest.raises(UserError, match="label 10 is not a class .* 10 classes: 0, 1, 2, "):
        sampling.sample(conditional, tmp_path / "out", num=1, labels=["10"])
    for words, message in ((["--label="], "label '' is not a class of this model"),
                           (["--labels="], "--labels is empty; name classes"),
                           (["--label=1", "--labels=2,3"], "--label=1 and --labels=2,3: give one"),
                           (["--labels=all,3"], "label all is not a class"),
                           (["--guidance=nan"], "guidance=nan must be a finite number of at least"),
                           (["--nodes=0,9", "--steps=3"], "nodes=0,9 lists the timesteps: leave"),
                           (["--nodes=0,x", "--steps=3"], "nodes='0,x' is not known; known: even"),
                           (["--nodes=0,,9"], "nodes='0,,9' is not known; known: even")):
        assert main(["sample", f"--workdir={conditional}", f"--out={tmp_path}/out", *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="label 11 is not in 0 ... 9"):
        programs.sampling_chain(build_model(config(**FIELDS)), labels=(11,))
    exp = build_model(config(**{**FIELDS, "sampler.guidance": 3.0}))
    with pytest.raises(UserError, match="guidance=2.0 is towards a label, and no image has one"):
        programs.sampling_chain(exp, labels=(10,), guidance=2.0)
    assert programs.sampling_chain(exp, labels=(10,)).passes == 1  # the config's is for the labels
    assert programs.sampling_chain(exp, labels=(3,)).passes == 2
    with pytest.raises(UserError, match="guidance=2.* not .model.label_dropout=0"):
        build_model(config(**{**FIELDS, "model.label_dropout": 0.0, "sampler.guidance": 2.0}))
    with pytest.raises(UserError, match="num_classes=7: digits has 10 classes: 0, 1"):
        train(tmp_path / "seven", **{"model.num_classes": 7})
    assert not (tmp_path / "seven").exists()


@pytest.mark.parametrize("source_has", [True, False])
def test_weights_with_and_without_classes_are_not_exchanged(
        source_has, conditional, straight, tmp_path):
    source, other = (conditional, straight) if source_has else (straight, conditional)
    fields = {} if source_has else FIELDS
    with pytest.raises(UserError, match="weights: model.num_classes: (0 -> 10|10 -> 0); take"):
        training.train(config(**fields), tmp_path / "new", stop=Stop(), watchdog=Watchdog(),
                       init_from=training.InitFrom(str(source)))
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="another config: .*model.num_classes: (0 -> 10|10 -> 0)"):
        train(other, **({"model.num_classes": 0} if not source_has else FIELDS))


def test_other_labels_are_not_trained_on(conditional):
    path = conditional / "data.json"
    kept = path.read_text()
    try:
        path.write_text(kept.replace('"labels": "', '"labels": "0'))
        with pytest.raises(UserError, match="was trained on other labels"):
            train(conditional, **{**FIELDS, "train.steps": 5})
    finally:
        path.write_text(kept)
