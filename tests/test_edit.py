"""Inpainting and editing: where they run, what they keep, the files, refusals."""

import re

import jax
import numpy as np
import pytest
from PIL import Image
from test_programs import as_one_program, model, tiny
from tiny_run import Stop

from ddpm_jax import edit, programs
from ddpm_jax.cli import main
from ddpm_jax.diffusion.inpainting import repaint_visits
from ddpm_jax.diffusion.prediction import Prediction
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import build_model

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8)
KNOWN = np.random.default_rng(1).random((8, 4, 4, 1)) < 0.5


@pytest.mark.slow
def test_results_do_not_depend_on_runner_batch_or_devices():
    wanted = None
    for runner, devices, index in [("jit", 1, [0, 1, 2, 3]), ("shard_map", 8, range(8)),
                                   ("pmap", 4, [3, 2, 1, 0])]:
        exp, params = model(devices, runner)
        exp = as_one_program(exp)
        index = np.array(index, np.int32)
        order = np.argsort(index)[:4]
        index, images, known = (exp.runner.put("batch", a) for a in (
            index, IMAGES[index], KNOWN[index]))
        chain = programs.sampling_chain(exp)
        fill = programs.inpaint_program(exp, chain, repaint_visits(chain.schedule, 2, 2))
        lower = programs.sampling_chain(exp, below=3)
        got = [exp.runner.local(out)[order] for out in (
            fill(params, np.uint32(3), index, images, known),
            programs.edit_program(exp, lower)(params, np.uint32(3), index, images))]
        wanted = got if wanted is None else wanted
        for one, same in zip(got, wanted, strict=True):
            assert np.abs(one.astype(int) - same).max() <= 1
    np.testing.assert_array_equal(wanted[0][KNOWN[:4]], IMAGES[:4][KNOWN[:4]])
    assert (wanted[0][~KNOWN[:4]] != IMAGES[:4][~KNOWN[:4]]).mean() > 0.9


def test_each_visit_of_a_level_draws_noise_of_its_own():
    """Numbers of the draws, not their values: by the level they would repeat."""
    exp, drawn = build_model(tiny(), jax.devices()[:1]), []
    chain = programs.sampling_chain(exp)

    def noise(key, index, t, shape):
        jax.debug.callback(lambda number: drawn.append(int(number)), t)
        return chain.noise(key, index, t, shape)

    def predict(params, **condition):
        return lambda x, t: Prediction(x, x, x, 0 * x)

    visits = repaint_visits(chain.schedule, 2, 2)
    fill = programs.inpaint_program(exp, chain._replace(noise=noise, predict=predict), visits)
    index = np.arange(8, dtype=np.int32)
    jax.block_until_ready(fill({}, np.uint32(0), index, IMAGES, KNOWN))
    jax.effects_barrier()
    assert len(visits.t) > len(set(visits.t.tolist()))
    assert sorted(drawn) == list(range(3 * len(visits.t)))


@pytest.fixture
def files(tmp_path):
    """Folders of two images and of their masks, of the model's size."""
    rng = np.random.default_rng(2)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for k, name in enumerate(("one", "two")):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(
            tmp_path / f"images/{name}.png")
        mask = np.zeros((8, 8), np.uint8)
        mask[:, 4 * k:4 * k + 4] = 255
        Image.fromarray(mask).save(tmp_path / f"masks/{name}.bmp")
    return tmp_path


def read(path):
    return np.asarray(Image.open(path))


def command(task, run, files, out, *more):
    mask = [f"--mask={files}/masks"] if task == "inpaint" else []
    return main.main([task, f"--workdir={run}", f"--image={files}/images", f"--out={out}",
                      "--noema", *mask, *more])


@pytest.mark.slow
def test_inpaint_keeps_the_known_pixels_in_the_png(straight, files):
    words = ("--jump_length=3", "--resamplings=2", "--seed=5")
    assert command("inpaint", straight, files, files / "a", *words, "--num=2") == 0
    for k, name in enumerate(("one", "two")):
        before = read(files / f"images/{name}.png")
        kept = read(files / f"masks/{name}.bmp") == 0
        results = [read(files / f"a/png/{name}-{i}.png") for i in range(2)]
        for i, after in enumerate(results):
            np.testing.assert_array_equal(after[kept], before[kept])
            assert (after[~kept] != before[~kept]).any()
            np.testing.assert_array_equal(
                after, np.load(files / "a/samples.npz")["arr_0"][2 * k + i, ..., 0])
        assert (results[0] != results[1]).any()
    # 2 rows of before, mask and two results, each enlarged to 64 pixels with gaps of 2
    assert read(files / "a/comparison.png").shape == (2 * 66 - 2, 4 * 66 - 2)
    assert command("inpaint", straight, files, files / "b", *words, "--batch_size=1") == 0
    for name in ("one", "two"):     # alone in its batch, and one of two results
        np.testing.assert_array_equal(read(files / f"b/png/{name}.png"),
                                      read(files / f"a/png/{name}-0.png"))


@pytest.mark.slow
def test_edit_keeps_more_of_the_image_the_less_it_is_noised(straight, files, capsys):
    settings = edit.Settings(ema=False, batch_size=1, sampler="dpmpp_2m", num=2)
    assert not edit.edit(straight, files / "images", files / "1.0", settings, strength=1.0,
                         stop=Stop(at=1))
    distances = []
    for strength in (1.0, 0.5):
        assert edit.edit(straight, files / "images", files / str(strength), settings,
                         strength=strength)
        distances.append(np.mean([
            np.abs(read(files / f"images/{name}.png").astype(float)
                   - read(files / f"{strength}/png/{name}-{k}.png")).mean()
            for name in ("one", "two") for k in range(2)]))
    assert distances[0] > 1.2 * distances[1]
    assert "edit: from t=4 of 9, 5 network calls an image" in capsys.readouterr().err
    assert command("edit", straight, files, files / "0.5", "--strength=0.25") == 2
    assert re.search("error: --out=.* another request .*strength: 0.5 -> 0.25",
                     capsys.readouterr().err)


@pytest.mark.parametrize("task, words, message", [
    ("edit", ["--strength=0"], "--strength=0.0 must be above 0 and at most 1"),
    ("edit", ["--strength=1.5"], "--strength=1.5 must be above 0"),
    ("edit", ["--strength=nan"], "--strength=nan must be above 0"),
    ("edit", ["--strength=0.1", "--sampler=plms"], "--strength=0.1, from t=0 on: .* raise --stren"),
    ("edit", ["--label="], "label '': this model has no classes"),
    ("edit", ["--num=3000000000"], "--num=3000000000 must be below 2.*31"),
    ("edit", ["--num=0"], "--num=0 must be at least 1"),
    ("edit", ["--num=2048"], "--num=2048 must be at most 2047"),
    ("inpaint", ["--resamplings=0"], "--resamplings=0 must be at least 1"),
    ("inpaint", ["--jump_length=10"], "jump_length=10 must be below the 10 steps"),
    ("inpaint", ["--sampler=dpmpp_2m"], "take ancestral or ddim"),
    ("inpaint", ["--mask="], "--mask is missing"),
])
def test_bad_flags_are_one_line(task, words, message, straight, files, capsys):
    assert command(task, straight, files, files / "out", *words) == 2
    error, = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert re.search(message, error) and not (files / "out").exists()


def test_a_folder_with_something_else_in_it_is_refused(straight, files, capsys):
    assert command("edit", straight, files, files / "images") == 2
    assert "images is not empty and holds no samples of ddpm" in capsys.readouterr().err
    assert sorted(p.name for p in (files / "images").iterdir()) == ["one.png", "two.png"]


def save(path, *shape, level=0, kind=np.uint8):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full(shape, level, kind)).save(path)
    return path


@pytest.mark.parametrize("image, mask, message", [
    (lambda p: save(p / "x.png", 9, 8), None, r"x.png is 8x9, the model's images are 8x8; crop"),
    (lambda p: save(p / "x.png", 8, 8, 3), None, "x.png is a colour image, the model's are grey"),
    (lambda p: p / "absent", None, "--image=.*absent: no such file or folder"),
    (lambda p: p, None, "--image=.* holds no images .*; it has images, masks"),
    (None, lambda p: save(p / "m.png", 4, 8), r"the mask .*m.png is 8x4, its image 8x8"),
    (None, lambda p: save(p / "m.png", 8, 8), "m.png has no white pixel, so there is nothing to"),
    (None, lambda p: save(p / "m.png", 8, 8, level=255), "m.png is white all over, so nothing of"),
    (lambda p: save(p / "x.png", 8, 8, 4), None, "x.png: has transparent pixels; flatten it"),
    (lambda p: save(p / "x.tif", 8, 8, kind=np.uint16), None, "x.tif: more than 8 bits a channel"),
    (lambda p: save(p / "images/z.png", 4, 8).parent, None, "z.png is 8x4, the model's images"),
    (None, lambda p: save(p / "m.png", 8, 8, 3, level=(255, 0, 0)), "m.png has colours; make"),
    (None, lambda p: save(p / "m/one.png", 8, 8, level=255).parent, "holds no mask for two.png"),
    (None, lambda p: p / "masks/one.txt", "--mask=.*one.txt: no such file or folder"),
])
def test_bad_images_and_masks_are_one_line(image, mask, message, files):
    image = files / "images" if image is None else image(files)
    mask = mask and mask(files)
    with pytest.raises(UserError, match=message) as error:
        edit._open_inputs((8, 8, 1), image, mask)
    assert "\n" not in str(error.value)


def test_grey_images_are_repeated_and_equal_stems_keep_their_endings(tmp_path):
    save(tmp_path / "x.png", 4, 4, level=7)
    save(tmp_path / "x.bmp", 4, 4, 3, level=9)
    inputs = edit._open_inputs((4, 4, 3), tmp_path, None)
    assert inputs.names == ["x.bmp", "x.png"]
    np.testing.assert_array_equal(inputs.read(1), np.full((4, 4, 3), 7))
    assert not inputs.known(0).any() and jax.tree.leaves(inputs.identity)
