"""Producers for `collect.collect`: features of samples and of given images, the bound of images.

Everything runs over all devices; only features leave them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ddpm_jax import programs
from ddpm_jax.data.datasets import read_rows
from ddpm_jax.data.labels import labels_for
from ddpm_jax.evaluation import protocols
from ddpm_jax.experiment import Experiment
from ddpm_jax.parallel import hosts
from ddpm_jax.training.steps import Batch


class Model(NamedTuple):
    """exp: the Experiment; params: on the devices; facts: what names them in a result."""
    exp: Experiment
    params: dict
    facts: dict


class Subject(NamedTuple):
    """What is evaluated. features(extractor, quantise) -> produce(start, count) of
    `collect.collect`; facts: what the images depend on; num: how many there are, None: as many as
    wanted; batch: images at a time; model: None where the images are given."""
    label: str
    features: Callable
    facts: dict
    num: int | None
    batch: int
    image_shape: tuple
    model: Model | None = None


def _single(values):
    """A single result of Runner.compile is not a tuple."""
    return values if len(values) > 1 else values[0]


def _named(names, out) -> dict:
    return dict(zip(names, out if len(names) > 1 else (out,), strict=True))


def _rows(runner, out, start, count, images_kept) -> dict:
    """The first ``count`` rows of each array; of whole images, those below ``images_kept``."""
    rows = {name: hosts.all_rows(runner, a)[:count] for name, a in out.items()}
    if "images" in rows:
        rows["images"] = rows["images"][:max(0, images_kept - start)]
    return rows


def _local_index(runner, start, count, batch) -> list[int]:
    """Global indices of this process's part of a batch; the last image fills an incomplete one."""
    first, local_batch, _ = hosts.local_slots(runner, batch)
    return [min(start + first + i, start + count - 1) for i in range(local_batch)]


def extraction(session, extractor) -> Callable:
    """-> features(images uint8 [B,H,W,C], on the devices) -> {name: batch array}."""
    runner = session.runner

    def program(params, images):
        return _single(extractor.apply(params, images.astype(jnp.float32)))

    compiled = session.program(("images", *extractor.names), lambda: runner.compile(
        program, ("replicated", "batch"), ("batch",) * len(extractor.names)))
    placed = runner.put("replicated", extractor.params)
    return lambda images: _named(extractor.names, compiled(placed, images))


def of_images(session, read, batch, *, images_kept=0) -> Callable:
    """Features of given images: read(i) -> uint8 [H,W,C]. A process reads only its own rows."""
    runner = session.runner

    def features(extractor, quantise=None):
        del quantise      # they are integers already
        extract = extraction(session, extractor)

        def produce(start, count):
            mine = _local_index(runner, start, count, batch)
            out = extract(runner.put("batch", read_rows(read, mine)))
            return _rows(runner, out, start, count, images_kept)

        return produce

    return features


def sampling_chain(model, options) -> programs.Chain:
    return programs.sampling_chain(
        model.exp, name=options.sampler, steps=options.steps, nodes=options.nodes,
        guidance=options.guidance)


def of_samples(session, model, options, batch, *, images_kept) -> Callable:
    """Sampling, quantisation and features in one program; whole images leave the devices only
    where "images" is among the extractor's parts. Image i depends on (seed, i) alone."""
    runner = session.runner

    def features(extractor, quantise):
        to_levels = protocols.QUANTISE[quantise]

        def finish(x_0, weights):
            return _single(extractor.apply(weights, to_levels(x_0)))

        compiled = session.program(
            ("samples", options.sampler, options.steps, options.nodes, options.guidance, quantise,
             *extractor.names),
            lambda: programs.sample_program(
                model.exp, sampling_chain(model, options), finish, extra=("replicated",),
                results=("batch",) * len(extractor.names)))
        placed = runner.put("replicated", extractor.params)

        def produce(start, count):
            index = hosts.local_indices(runner, start, batch)
            out = compiled(model.params, np.uint32(options.seed), index, placed)
            return _rows(runner, _named(extractor.names, out), start, count, images_kept)

        return produce

    return features


def along_chain(session, model, options, batch, *, every, shown) -> Callable:
    """Features of the x_0 predicted at every ``every``-th step, named "NAME K" for look K from
    noise to image, and the "frames" of the first ``shown`` images."""
    runner = session.runner

    def features(extractor, quantise):
        del quantise      # whole grey levels, as they are shown
        program = programs.progressive_program(model.exp, sampling_chain(model, options), every)
        extract = extraction(session, extractor)

        def produce(start, count):
            predicted = program(model.params, np.uint32(options.seed),
                                hosts.local_indices(runner, start, batch))[1]
            frames, rows = runner.local(predicted), {}
            for k in range(frames.shape[1]):
                out = extract(runner.put("batch", frames[:, k]))
                rows |= {f"{name} {k}": hosts.all_rows(runner, a)[:count]
                         for name, a in out.items()}
            kept = hosts.all_rows(runner, predicted)[:count]
            return rows | {"frames": kept[:max(0, shown - start)]}

        return produce

    return features


def of_bound(session, model, source, seed, batch, chosen=None) -> Callable:
    """-> produce: the variational bound at all t (hojonathanho/diffusion, diffusion_utils_2.py:
    313-337) of the real images ``chosen`` (indices; None: all); the noise of image i depends on
    (seed, i)."""
    runner, chosen = session.runner, np.arange(len(source)) if chosen is None else chosen
    compiled = session.program(("bound",), lambda: programs.bound_program(model.exp))
    labels = labels_for(source, model.exp.model.num_classes)

    def produce(start, count):
        mine = chosen[_local_index(runner, start, count, batch)]
        out = compiled(model.params, np.uint32(seed),
                       runner.put("batch", Batch(read_rows(source.__getitem__, mine),
                                                 None if labels is None else labels[mine])),
                       runner.put("batch", mine.astype(np.int32)))
        rows = _rows(runner, out._asdict(), start, count, 0)
        return {"bpd": rows["total"], "prior": rows["prior"]} | {
            f"sum_{short}": rows[name].astype(np.float64).sum(0)
            for short, name in (("terms", "terms"), ("mse", "mse"), ("eps", "eps_mse"))}

    return produce
