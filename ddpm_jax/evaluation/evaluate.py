"""Evaluate a run or given images: collect features, compute the metrics of METRICS."""

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import features, protocols, references
from ddpm_jax.evaluation.inception import weights
from ddpm_jax.evaluation.metrics import (
    CLASSES,
    COLLECTIVE,
    FEATURES,
    METRICS,
    MODEL,
    REALS,
    REFERENCE,
    SPACE,
    Context,
    collect_features,
    default_num,
    make_extractor,
    splits_of,
    with_implied,
)
from ddpm_jax.evaluation.options import NN_QUERIES, Options
from ddpm_jax.evaluation.session import Session
from ddpm_jax.evaluation.subset import ORDER
from ddpm_jax.parallel import hosts
from ddpm_jax.run_log import say

# ---- checks, before anything is computed ----


def _known(field, name, table):
    if name not in table:
        raise UserError(f"{field}={name} is not known; known: {', '.join(table)}")


def check_options(options: Options, *, of_model: bool = True) -> protocols.Protocol:
    """The protocol meant. UserError for a name or number that cannot work, or for a metric of a
    model where images are given."""
    prefix = options.prefix
    if not options.metrics:
        raise UserError(f"{prefix}metrics is empty; known: {', '.join(METRICS)}")
    for name in options.metrics:
        _known(f"{prefix}metrics", name, METRICS)
    _known(f"{prefix}protocol", options.protocol, protocols.PROTOCOLS)
    protocol = protocols.PROTOCOLS[options.protocol]
    quantise = options.quantise or protocol.quantise
    _known(f"{prefix}quantise", quantise, protocols.QUANTISE)
    for name in ("num", "bpd_num", "batch_size", "steps", "crop"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{prefix}{name}={value} must be at least 1")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"{prefix}seed={options.seed} must be in 0 ... 2**32-1")
    for name in options.metrics:
        if MODEL in METRICS[name].needs and not of_model:
            raise UserError(f"--samples: {name} is of a model, not of images; leave it out of "
                            "--metrics")
    return protocol._replace(quantise=quantise)


def number_of_samples(subject, options, protocol) -> int:
    num = options.num or (subject.num if subject.num is not None
                          else default_num(options.metrics))
    if subject.num is not None and num > subject.num:
        raise UserError(f"{options.prefix}num={num}: there are only {subject.num} images")
    for name in options.metrics:
        metric = METRICS[name]
        if metric.parts and num < metric.least(protocol):
            raise UserError(f"{options.prefix}num={num}: {name} needs {metric.least(protocol)} "
                            "images or more")
    return num


def _check_sizes(options, protocol, sources):
    """Raise UserError where a split has fewer real images than Metric.least, or, where one split is
    halved, than twice that."""
    for name in options.metrics:
        metric = METRICS[name]
        if REALS not in metric.needs or not metric.parts:
            continue
        least = metric.least(protocol)
        needed = dict.fromkeys(("train", "test"), least) if "test" in sources else {
            "train": 2 * least}
        for split, number in needed.items():
            if len(sources[split]) < number:
                raise UserError(f"{options.prefix}metrics={name} needs {number} real images or "
                                f"more; {sources.name}, split {split}, has {len(sources[split])}")


def load_weights(options: Options) -> weights.Weights:
    """Inception's weights. Raises UserError where they are not found or not known."""
    found = weights.load(weights.find(options.inception_weights),
                         allow_unknown=options.allow_unknown_weights)
    if found.source_sha256 not in weights.KNOWN_SOURCES:
        say(f"Inception's weights {found.path} come from a source whose sha256 is not known")
    return found


def _check_features(options, protocol, reference):
    """Raises UserError where a metric compares with features that the reference lacks."""
    for name in options.metrics:
        if FEATURES not in METRICS[name].needs:
            continue
        if reference.features is None:
            raise UserError(f"{name} needs the reference's features, and {reference.path} has "
                            "none; make it with `ddpm reference --features=10000`")
        least = METRICS[name].least(protocol)
        if len(reference.features) < least:
            raise UserError(f"{name} needs the features of {least} real images or more, and "
                            f"{reference.path} has {len(reference.features)}; make it with `ddpm "
                            "reference --features=10000`")


def _load_reference(options, protocol, subject, inception, dataset, sources) -> tuple:
    """-> (Reference, warnings); sources: {split: Source} that are opened anyway."""
    if not options.reference:
        raise UserError("--reference=FILE is missing: fid, kid and pr compare with statistics of "
                        "real images; make them once with `ddpm reference --dataset=NAME "
                        "--split=train --out=FILE`")
    reference = references.load(options.reference)
    _check_features(options, protocol, reference)
    return reference, references.check(
        reference, force=options.force, protocol=protocols.describe(protocol),
        weights_sha256=inception.state_sha256, image_shape=subject.image_shape,
        dataset=dataset,
        n=len(sources[reference.split]) if reference.split in sources else None)


def make_context(subject: features.Subject, options: Options, session: Session) -> Context:
    """Everything that options.metrics, and what they imply, need, loaded and checked. Raises
    UserError."""
    protocol = check_options(options, of_model=subject.model is not None)
    if subject.model is not None:
        options = options._replace(metrics=with_implied(options.metrics))
    rows = [METRICS[name] for name in options.metrics]
    needs = frozenset().union(*(row.needs for row in rows))
    if CLASSES in needs and not subject.model.exp.model.num_classes:
        raise UserError(f"{options.prefix}metrics=labels: this model has no classes "
                        "(model.num_classes=0); leave it out")
    if REALS in needs and session.sources is None:
        raise UserError(f"--metrics={','.join(options.metrics)}: nn and offline compare with real "
                        "images; add --dataset=NAME")
    if MODEL in needs:
        splits_of(options, session.sources)
    if REALS in needs:
        _check_sizes(options, protocol, session.sources)
    inception = reference = None
    warnings = []
    if any("inception" in row.parts for row in rows):
        inception = load_weights(options)
    if REFERENCE in needs:
        dataset = None if session.sources is None else session.sources.name
        reference, warnings = _load_reference(
            options, protocol, subject, inception, dataset,
            session.sources if REALS in needs else {})
    for text in warnings:
        session.say(f"warning: {text}")
    return Context(options, protocol, subject, session, inception, reference, tuple(warnings))


# ---- evaluation ----


def evaluate(subject: features.Subject, options: Options, session: Session) -> tuple[list, dict]:
    """options.metrics of the subject. -> ([(label, values, provenance)], {name: picture}), with
    values and pictures on process 0 only: one record of the samples, and those of metrics that
    have their own.

    Raises StoppedError where a signal ended it, UserError before any image is sampled where
    something that a metric needs is missing.
    """
    num = number_of_samples(subject, options, check_options(
        options, of_model=subject.model is not None))
    context = make_context(subject, options, session)
    options = context.options
    rows = [METRICS[name] for name in options.metrics]
    samples = _collect_samples(context, rows, num)
    values, pictures, records = {}, {}, []
    for row in rows:
        if not (hosts.is_main_process() or row.needs & COLLECTIVE):
            continue
        found = row.compute(context, samples)
        pictures |= found.pictures
        if found.record:
            facts = subject.model.facts
            records.append((f"{facts['weights']}, {found.record}", found.values,
                            facts | found.provenance))
        else:
            values |= found.values
    if options.keep_images:
        pictures["samples"] = samples.get("images")
    if any(row.parts for row in rows):
        records.insert(0, (_label(context, num), values, _provenance(context, num)))
    return records, pictures


def _collect_samples(context, rows, num) -> dict:
    """Features of the samples; {} where no metric needs any, and on all processes but the first."""
    subject = context.subject
    parts = [part for row in rows for part in row.parts]
    if not parts:
        return {}
    if context.options.keep_images:
        parts.append("images")
    return collect_features(
        context.session, "samples", subject.features, make_extractor(context, parts), num=num,
        batch=subject.batch, facts=subject.facts | {"batch": subject.batch},
        quantise=context.protocol.quantise)


def _label(context, num) -> str:
    label = f"{context.subject.label}, {num} images"
    if context.subject.model is None:
        return label
    if context.options.quantise:
        label += f", quantise {context.options.quantise}"
    if context.reference is not None:
        r = context.reference
        label += f", against {r.dataset or 'foreign'} {r.split or r.path}"
    return label


def _provenance(context, num) -> dict:
    protocol, reference = context.protocol, context.reference
    facts = context.subject.facts | {
        "num": num, "protocol": protocol.name, "quantise": protocol.quantise,
        "resize": protocol.resize, "scale": protocol.scale, "precision": protocol.precision,
        "warnings": list(context.warnings), "order": ORDER}
    if context.weights is not None:
        facts |= {"inception_sha256": context.weights.state_sha256,
                  "inception_source_sha256": context.weights.source_sha256}
    if reference is not None:
        facts["reference"] = {
            "sha256": references.identity(reference), "n": reference.n,
            "dataset": reference.dataset, "split": reference.split,
            "protocol": reference.protocol or "unknown", "path": reference.path}
    stored = context.session.classifiers.get(context.options.classifier_dir)
    parts = {part for name in context.options.metrics for part in METRICS[name].parts}
    if stored and parts & {"classifier", SPACE}:
        facts["classifier_sha256"] = stored.sha256
    return facts


def model_subject(model: features.Model, options: Options, session: Session) -> features.Subject:
    """The samples of a model."""
    config = model.exp.config
    batch = options.batch_size or config.sampler.batch_size
    batch = min(batch, options.num or batch)
    chain = features.sampling_chain(model, options)
    sampler = options.sampler or config.sampler.name
    images_kept = options.num or 1 << 31 if options.keep_images else NN_QUERIES
    choices = "".join(f", {name} {value}" for name, value in chain.choices.items())
    return features.Subject(
        f"{model.facts['weights']}, {sampler} {chain.num_steps} steps{choices}, seed "
        f"{options.seed}",
        features.of_samples(session, model, options, batch, images_kept=images_kept),
        model.facts | chain.choices | {
            "sampler": sampler, "sampler_steps": chain.num_steps, "seed": options.seed,
            "clip_denoised": config.sampler.clip_denoised},
        None, batch, model.exp.image_shape, model)


def evaluate_run(model: features.Model, options: Options, session: Session) -> tuple[list, dict]:
    """`evaluate` of the samples of a model."""
    check_options(options)
    return evaluate(model_subject(model, options, session), options, session)
