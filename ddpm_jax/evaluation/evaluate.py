"""Evaluate a run or given images: extract features, compute the metrics of METRICS."""

import time

import jax

from ddpm_jax import programs
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import collect, measures, protocols, references
from ddpm_jax.evaluation.features import (
    Subject,
    bound_draws,
    gatherer,
    get_classifier,
    model_draws,
    open_splits,
    report_progress,
)
from ddpm_jax.evaluation.inception import weights
from ddpm_jax.evaluation.metrics import METRICS, Context
from ddpm_jax.evaluation.options import (
    BOUND,
    DEFAULT_NUM,
    DRAWN,
    NN_QUERIES,
    Options,
    StoppedError,
)
from ddpm_jax.storage import files


def check_options(options: Options) -> protocols.Protocol:
    """The protocol meant. UserError for a name or number that cannot work."""
    known = (*METRICS, BOUND)
    for name in options.metrics:
        if name not in known:
            raise UserError(f"--metrics={name} is not known; known: {', '.join(known)}")
    if not options.metrics:
        raise UserError(f"--metrics is empty; known: {', '.join(known)}")
    if options.protocol not in protocols.PROTOCOLS:
        raise UserError(f"--protocol={options.protocol} is not known; known: "
                        f"{', '.join(protocols.PROTOCOLS)}")
    if options.quantise not in (None, *protocols.QUANTISE):
        raise UserError(f"--quantise={options.quantise} is not known; known: "
                        f"{', '.join(protocols.QUANTISE)}")
    for name in ("num", "bpd_num", "batch_size", "steps", "crop"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed={options.seed} must be in 0 ... 2**32-1")
    protocol = protocols.PROTOCOLS[options.protocol]
    return protocol._replace(quantise=options.quantise or protocol.quantise)


def load_weights(options: Options) -> weights.Weights:
    found = weights.load(weights.find(options.inception_weights),
                         allow_unknown=options.allow_unknown_weights)
    if found.source_sha256 not in weights.KNOWN_SOURCES and jax.process_index() == 0:
        print(f"Inception's weights {found.path} come from a source whose sha256 is not known")
    return found


def _load_reference(options, protocol, subject, inception) -> tuple:
    if not options.reference:
        raise UserError("--reference=FILE is missing: fid, kid and pr compare with statistics of "
                        "real images; make them once with `ddpm reference --dataset=NAME "
                        "--split=train --out=FILE`")
    reference = references.load(options.reference)
    names = {s.name for s in subject.sources.values()}
    return reference, references.check(
        reference, force=options.force, protocol=protocols.describe(protocol),
        weights_sha256=inception.state_sha256, image_shape=subject.image_shape,
        dataset=next(iter(names)) if names else None,
        n=len(subject.sources[reference.split]) if reference.split in subject.sources else None)


def make_context(subject, options, gather, memory, say) -> tuple[Context, list]:
    protocol = check_options(options)
    needs = frozenset().union(*(METRICS[m].needs for m in options.metrics if m != BOUND))
    if "reals" in needs and not subject.sources:
        raise UserError(f"--metrics={','.join(options.metrics)}: nn and offline compare with real "
                        "images; add --dataset=NAME")
    inception = reference = classifier = None
    warnings = []
    if "weights" in needs:
        inception = load_weights(options)
    if "reference" in needs:
        reference, warnings = _load_reference(options, protocol, subject, inception)
    if "reals" in needs:
        if "classifier" not in memory:
            memory["classifier"] = get_classifier(subject.sources, options.classifier_dir, say)
        classifier = memory["classifier"]
    return Context(options, protocol, subject, inception, classifier, reference, gather,
                   memory), warnings


def evaluate_images(subject: Subject, options: Options, *, folder=None, stop=None,
                    say=lambda text: None, memory=None) -> tuple[dict, dict, dict]:
    """All metrics of samples. -> (values, pictures, provenance); values only on process 0.

    Raises StoppedError where a signal asked to leave, UserError before any image is drawn where
    something that a metric needs is missing.
    """
    protocol = check_options(options)
    names = [m for m in options.metrics if m != BOUND]
    if not names:
        return {}, {}, {}
    memory = {} if memory is None else memory
    context, warnings = make_context(
        subject, options, gatherer(folder, stop, protocol, say, memory), memory, say)
    for text in warnings:
        say(f"warning: {text}")
    wanted = max(DRAWN.get(name, DEFAULT_NUM) for name in names)
    num = options.num or (subject.num if subject.num is not None else wanted)
    if subject.num is not None and num > subject.num:
        raise UserError(f"--num={num}: there are only {subject.num} images")
    parts = {}
    for name in names:
        parts |= METRICS[name].parts(context)
    if options.keep_images:
        parts |= {"images": {}}
    fake = context.gather("samples", subject.draw, num, subject.facts | {"batch": subject.batch},
                          parts, protocol.quantise)
    values, pictures = {}, {}
    for name in names:
        needs_all = METRICS[name].needs & {"reals"}      # its own collection runs on all processes
        if jax.process_index() == 0 or needs_all:
            found, drawn = METRICS[name].compute(context, fake)
            values |= found
            pictures |= drawn
    if options.keep_images:
        pictures["samples"] = fake.get("images")
    provenance = subject.facts | {
        "num": num, "protocol": protocol.name, "quantise": protocol.quantise,
        "resize": protocol.resize, "scale": protocol.scale, "precision": protocol.precision,
        "warnings": warnings}
    if context.weights is not None:
        provenance |= {"inception_sha256": context.weights.state_sha256,
                       "inception_source_sha256": context.weights.source_sha256}
    if context.reference is not None:
        r = context.reference
        provenance["reference"] = {
            "sha256": references.identity(r), "n": r.n, "dataset": r.dataset, "split": r.split,
            "protocol": r.protocol or "unknown", "path": r.path}
    if context.classifier is not None:
        provenance["classifier_sha256"] = context.classifier.sha256
    return values, pictures, provenance


def evaluate_bound(exp, params, sources, options: Options, *, facts, batch, folder=None, stop=None,
                   say=lambda text: None, memory=None) -> tuple[dict, dict]:
    """Bits/dim of real images, by split. -> ({'bpd_test': ..., ...}, provenance)."""
    values, sizes, memory = {}, {}, {} if memory is None else memory
    for split in options.splits:
        if split not in sources:
            say(f"bpd: the dataset has no split {split!r}")
            continue
        source = sources[split]
        num = min(len(source), options.bpd_num or len(source))
        size = min(batch, num)
        request = facts | {"fingerprint": source.fingerprint, "split": split, "batch": size}
        where = folder and files.join(folder, f"bpd-{split}-{collect.key(request)}")
        started = time.monotonic()
        sums = collect.collect(
            bound_draws(exp, params, source, options.seed, size, memory), num=num, batch=size,
            folder=where, request=request, stop=stop, what=f"{split} image",
            progress=report_progress(say, f"bpd {split}", num))
        if sums is None:
            raise StoppedError
        say(f"bpd {split}: {num} images, {time.monotonic() - started:.1f} s")
        if jax.process_index() == 0:
            found = measures.likelihood(sums)
            values |= {name.replace("bpd", f"bpd_{split}", 1) if name.startswith("bpd")
                       else f"{name}_{split}": v for name, v in found.items()}
            sizes[split] = {"n": num, "of": len(source), "fingerprint": source.fingerprint}
    if not sizes and jax.process_index() == 0:
        raise UserError(f"--splits={','.join(options.splits)}: the dataset has "
                        f"{', '.join(sources)}")
    return values, facts | {"images": sizes, "bound": "L_vlb, clip_denoised, one noise draw a t"}


def run_subject(exp, params, options: Options, facts: dict, memory: dict) -> Subject:
    """The images that a run's model draws."""
    config = exp.config
    chain = programs.sampling_chain(exp, name=options.sampler, steps=options.steps)
    batch = options.batch_size or config.sampler.batch_size
    batch = min(batch, options.num or batch)
    facts = facts | {"sampler": options.sampler or config.sampler.name,
                     "sampler_steps": chain.num_steps, "seed": options.seed,
                     "clip_denoised": config.sampler.clip_denoised}
    if "sources" not in memory:
        memory["sources"] = open_splits(config.data.name, config.data.dir, exp.image_shape)
    draws = model_draws(exp, chain, params, options.seed, batch, memory=memory,
                        images_kept=options.num or 1 << 31 if options.keep_images else NN_QUERIES)
    return Subject(draws, facts, None, batch, exp.image_shape, memory["sources"], exp.runner)


def evaluate_run(exp, params, options: Options, *, facts, folder=None, stop=None,
                 say=lambda text: None, memory=None) -> tuple[list, dict]:
    """-> ([(label, values, provenance)], pictures): one record of samples, one of the bound."""
    check_options(options)
    memory = {} if memory is None else memory
    subject = run_subject(exp, params, options, facts, memory)
    records, pictures = [], {}
    values, drawn, provenance = evaluate_images(
        subject, options, folder=folder, stop=stop, say=say, memory=memory)
    if provenance:
        label = (f"{facts['weights']}, {provenance['sampler']} {provenance['sampler_steps']} steps,"
                 f" seed {options.seed}, {provenance['num']} images")
        if options.quantise:
            label += f", quantise {options.quantise}"
        if "reference" in provenance:
            r = provenance["reference"]
            label += f", against {r['dataset'] or 'foreign'} {r['split'] or r['path']}"
        records.append((label, values, provenance))
        pictures |= drawn
    if {BOUND, "offline"} & set(options.metrics):      # offline: all that needs no download
        values, provenance = evaluate_bound(
            exp, params, subject.sources, options, facts=facts | {"seed": options.seed},
            batch=subject.batch, folder=folder, stop=stop, say=say, memory=memory)
        every = "all" if options.bpd_num is None else options.bpd_num
        records.append((f"{facts['weights']}, bound, seed {options.seed}, {every} images", values,
                        provenance))
    return records, pictures
