"""Change given images with a trained run: fill in pixels, or noise and decode the whole image."""

import collections
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import checkpoints, programs
from ddpm_jax.data import folders
from ddpm_jax.data import images as image_data
from ddpm_jax.data.labels import chosen_labels
from ddpm_jax.diffusion.inpainting import repaint_visits
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import Experiment
from ddpm_jax.parallel import hosts
from ddpm_jax.run_log import say
from ddpm_jax.sample import check_numbers, claimed, draw, load_run
from ddpm_jax.storage import files, pictures

MOST_IMAGES, MOST_RESULTS = 2**20, 2**11 - 1  # their product numbers the noise, an int32
MOST_SHOWN = 16         # images in the picture of before and after
FILLED_IN_FROM = 128    # grey level of a mask
GREY_ENOUGH = 32        # levels between the channels of a mask, which JPEG does not keep equal


class Settings(NamedTuple):
    """The user's choices, as the flags of `ddpm inpaint` and `ddpm edit`; None takes the run's.
    num: results for each image; label: a class, None: no label."""

    step: int | None = None
    ema: bool = True
    seed: int = 0
    num: int = 1
    batch_size: int | None = None
    sampler: str | None = None
    steps: int | None = None
    nodes: str | None = None
    guidance: float | None = None
    label: str | None = None


class Inputs(NamedTuple):
    """Image i: read(i) -> uint8 [H,W,C]; known(i) -> bool [H,W,1], True where it is kept. names:
    of the results, without .png; identity: sha256 of the files."""

    names: list
    read: Callable
    known: Callable
    identity: str


class Edit(NamedTuple):
    """A loaded run and what it does: program(params, seed, index, images, known) -> images."""

    exp: Experiment
    params: Any
    chain: programs.Chain
    program: Callable
    request: dict


def inpaint(workdir, image, mask, out, settings: Settings, *, jump_length=10, resamplings=10,
            stop=None) -> bool:
    """Fill in the white pixels of ``mask`` in ``image`` (a file or a folder each; of a folder of
    masks the one with the image's name) and write to the folder ``out``: png/NAME.png, the same as
    samples.npz (arr_0: uint8 NHWC), and comparison.png with before, mask and after.

    jump_length, resamplings: RePaint's; 1 resampling is plain replacement. Result k of image i of
    the folder depends on the image, its mask and (seed, i, k) alone. Interrupted calls resume;
    returns False where ``stop`` requested it. Raises UserError for bad input.
    """
    check_numbers(settings.seed, num=settings.num, batch_size=settings.batch_size,
                  jump_length=jump_length, resamplings=resamplings)
    exp, params, _, facts = load_run(workdir, step=settings.step, ema=settings.ema)
    chain = _chain(exp, workdir, settings)
    if jax.tree.leaves(jax.eval_shape(chain.sampler.start, np.zeros(1, np.float32))):
        raise UserError(f"--sampler={settings.sampler or exp.config.sampler.name} remembers "
                        "predictions from before pixels were replaced; take ancestral or ddim")
    try:
        visits = repaint_visits(chain.schedule, jump_length, resamplings)
    except ValueError as error:
        raise UserError(f"--jump_length, --resamplings: {error}") from None
    request = facts | {"task": "inpaint", "jump_length": jump_length, "resamplings": resamplings}
    edit = Edit(exp, params, chain, lambda: programs.inpaint_program(exp, chain, visits), request)
    say(f"inpaint: {len(visits.t)} network calls an image")
    inputs = hosts.on_main_process(_open_inputs, exp.image_shape, image, mask)
    return _run(edit, inputs, workdir, out, settings, stop)


def edit(workdir, image, out, settings: Settings, *, strength=0.5, stop=None) -> bool:
    """Noise ``image`` (a file or a folder) up to the share ``strength`` of the sampler's steps and
    decode it, which keeps less of it the larger ``strength`` in (0, 1] is. Files, resuming and
    errors as ``inpaint``; any sampler."""
    check_numbers(settings.seed, num=settings.num, batch_size=settings.batch_size)
    if not 0 < strength <= 1:
        raise UserError(f"--strength={strength} must be above 0 and at most 1")
    exp, params, _, facts = load_run(workdir, step=settings.step, ema=settings.ema)
    whole = _chain(exp, workdir, settings, below=exp.config.diffusion.num_timesteps)
    first = int(whole.schedule.timesteps[max(1, round(strength * whole.num_steps)) - 1])
    try:
        chain = _chain(exp, workdir, settings, below=first + 1)
    except UserError as error:
        raise UserError(f"--strength={strength}, from t={first} on: {error}; or raise --strength"
                        ) from None
    run = Edit(exp, params, chain, lambda: _without_mask(programs.edit_program(exp, chain)),
               facts | {"task": "edit", "strength": strength})
    say(f"edit: from t={first} of {exp.config.diffusion.num_timesteps - 1}, {chain.num_steps} "
        "network calls an image")
    inputs = hosts.on_main_process(_open_inputs, exp.image_shape, image, None)
    return _run(run, inputs, workdir, out, settings, stop)


def _chain(exp, workdir, settings, below=None):
    label = settings.label
    if label is None and exp.model.num_classes:
        label = "none"
    return programs.sampling_chain(
        exp, below=below, name=settings.sampler, steps=settings.steps, nodes=settings.nodes,
        guidance=settings.guidance, labels=chosen_labels(
            None if label is None else [label], checkpoints.class_names(workdir),
            exp.model.num_classes, exp.model.no_label))


def _without_mask(program):
    return lambda params, seed, index, images, known: program(params, seed, index, images)


# ---- the images and masks, on process 0 ----


def _listed(path, flag) -> list:
    """(name, path) of the image files: one, or those of a folder in order of their names."""
    place = files.resolve(path)
    with files.storage_errors(place, "read", advice=""):
        if not place.exists():
            raise UserError(f"{flag}={path}: no such file or folder")
        if not place.is_dir():
            return [(place.name, place)]
        there = sorted(entry.name for entry in place.iterdir())
    names = [name for name in there if not folders.why_left_out(name)]
    if not names:
        raise UserError(f"{flag}={path} holds no images ({', '.join(image_data.SUFFIXES)})"
                        + (f"; it has {', '.join(there[:3])}" if there else ""))
    if len(names) > MOST_IMAGES:
        raise UserError(f"{flag}={path} holds {len(names):,} images; at most {MOST_IMAGES:,} are "
                        "numbered, so split the folder")
    return [(name, place / name) for name in names]


def _size(array) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _read_image(path, shape) -> np.ndarray:
    """-> uint8 of the model's shape [H,W,C]; grey becomes RGB."""
    found = image_data.decode(files.read_bytes(path), path)
    if found.shape[:2] != shape[:2]:
        raise UserError(f"{path} is {_size(found)}, the model's images are {shape[1]}x{shape[0]}; "
                        "crop or resize it first")
    if found.shape[2] > shape[2]:
        raise UserError(f"{path} is a colour image, the model's are grey; convert it first")
    return np.repeat(found, shape[2], axis=2) if found.shape[2] < shape[2] else found


def _read_known(path, shape) -> np.ndarray:
    """-> bool [H,W,1], False where the mask is white."""
    found = image_data.decode(files.read_bytes(path), path)
    if found.shape[:2] != shape[:2]:
        raise UserError(f"the mask {path} is {_size(found)}, its image {shape[1]}x{shape[0]}; "
                        "crop or resize the mask")
    if np.ptp(found, axis=2).max() > GREY_ENOUGH:
        raise UserError(f"the mask {path} has colours; make it black, which is kept, and "
                        "white, which is filled in")
    known = found.mean(axis=2, keepdims=True) < FILLED_IN_FROM
    if known.all():
        raise UserError(f"the mask {path} has no white pixel, so there is nothing to fill in: "
                        "paint what to replace white")
    if not known.any():
        raise UserError(f"the mask {path} is white all over, so nothing of the image is kept: "
                        "paint what to keep black (`ddpm sample` draws whole images)")
    return known


def _masks_of(rows, mask) -> list:
    """The path of each image's mask."""
    masks = _listed(mask, "--mask")
    if not files.resolve(mask).is_dir():
        return [path for _, path in masks] * len(rows)
    by_name = {pathlib.PurePath(name).stem: path for name, path in masks}
    for name, _ in rows:
        if pathlib.PurePath(name).stem not in by_name:
            raise UserError(f"--mask={mask} holds no mask for {name}: none of its images has that "
                            "name before the dot")
    return [by_name[pathlib.PurePath(name).stem] for name, _ in rows]


def _open_inputs(shape, image, mask) -> Inputs:
    """Reads each file once, so that what is wrong shows before anything is computed."""
    rows = _listed(image, "--image")
    masks = [None] * len(rows) if mask is None else _masks_of(rows, mask)
    digest = hashlib.sha256()
    for (name, path), mask_path in zip(rows, masks, strict=True):
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
        digest.update(_read_image(path, shape).tobytes())
        if mask is not None:
            digest.update(_read_known(mask_path, shape).tobytes())
    stems = [pathlib.PurePath(name).stem for name, _ in rows]
    count = collections.Counter(stems)
    names = [stem if count[stem] == 1 else name
             for stem, (name, _) in zip(stems, rows, strict=True)]
    return Inputs(
        names, lambda i: _read_image(rows[i][1], shape),
        lambda i: (np.zeros((*shape[:2], 1), bool) if mask is None
                   else _read_known(masks[i], shape)), digest.hexdigest()[:16])


# ---- the work, on all processes ----


def _run(edit, inputs, workdir, out, settings, stop) -> bool:
    names, identity = hosts.broadcast_json(inputs and (inputs.names, inputs.identity))
    num = settings.num
    if num > MOST_RESULTS:
        raise UserError(f"--num={num} must be at most {MOST_RESULTS}")
    out, total = files.resolve(out), len(names) * num
    batch = min(settings.batch_size or edit.exp.config.sampler.batch_size, total)
    request = edit.request | {
        "images_sha256": identity, "seed": settings.seed, "num": num, "batch_size": batch,
        "sampler": settings.sampler or edit.exp.config.sampler.name,
        "steps": edit.chain.num_steps, **edit.chain.choices}
    with claimed(out, request, workdir):
        if not draw(out, lambda: _producer(edit, inputs, settings, total, batch), num=total,
                    batch=batch, stop=stop, name=request["task"]):
            return False
        if hosts.is_main_process():
            _write_pictures(out, inputs, num, masked=request["task"] == "inpaint")
    say(f"{total} images: {out}/png, comparison.png, samples.npz")
    return True


def _producer(edit, inputs, settings, total, batch):
    """Row r is result r % num of image r // num."""
    exp, program = edit.exp, edit.program()
    first, count_here, slots = hosts.local_slots(exp.runner, batch)

    def produce(start, count):
        image, result = np.divmod(np.minimum(start + np.arange(slots), total - 1), settings.num)
        batch_of = [np.zeros((slots, *exp.image_shape), np.uint8),
                    np.zeros((slots, *exp.image_shape[:2], 1), bool)]
        if hosts.is_main_process():
            for i in np.unique(image):
                for array, read in zip(batch_of, (inputs.read, inputs.known), strict=True):
                    array[image == i] = read(i)
        rows = [(result * MOST_IMAGES + image).astype(np.int32), *hosts.broadcast_arrays(batch_of)]
        mine = [exp.runner.put("batch", a[first:first + count_here]) for a in rows]
        return {"images": hosts.all_rows(
            exp.runner, program(edit.params, np.uint32(settings.seed), *mine))[:count]}

    return produce


def _write_pictures(out, inputs, num, *, masked):
    """comparison.png has a row an image: before, the mask, the results; then each result."""
    images = files.read_npz(out / "samples.npz")["arr_0"]
    rows = []
    for i in range(min(len(inputs.names), MOST_SHOWN)):
        before = inputs.read(i)
        rows.append(before)
        if masked:
            rows.append(np.broadcast_to(np.where(inputs.known(i), 0, 255), before.shape))
        rows += list(images[i * num:(i + 1) * num])
    columns = 1 + masked + num
    pictures.write_png(out / "comparison.png", pictures.tile(np.uint8(rows), columns))
    for r, image in enumerate(images):
        name = inputs.names[r // num] + (f"-{r % num}" if num > 1 else "")
        pictures.write_png(out / "png" / f"{name}.png", image)
