"""Train and evaluate the cells of a target, draw its figure, write its page."""

from ddpm_jax import checkpoints, run_log
from ddpm_jax.config import flatten, override
from ddpm_jax.config_checks import SAMPLER_DEFAULTS
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import html_report as html
from ddpm_jax.evaluation.along import evaluate_along
from ddpm_jax.evaluation.evaluate import check_options, evaluate_run, load_weights
from ddpm_jax.evaluation.features import Model
from ddpm_jax.evaluation.make_reference import make_reference
from ddpm_jax.evaluation.options import StoppedError
from ddpm_jax.evaluation.records import only_writer, write_results
from ddpm_jax.evaluation.session import Session, session_of
from ddpm_jax.parallel import hosts
from ddpm_jax.reproduction import costs, figures, targets
from ddpm_jax.reproduction.paper_results import ours
from ddpm_jax.reproduction.targets import (
    DRAWN_BY,
    Request,
    by_chain,
    by_own_sampler,
    cell_config,
    check_imported,
    existing,
    is_imported,
    name_of,
    wanted_splits,
)
from ddpm_jax.run_log import say
from ddpm_jax.sample import load_run
from ddpm_jax.storage import files, pictures
from ddpm_jax.train import train

VALUE_OF = {"is": "is", "fid": "fid_train", "bpd": "bpd_test", "nn": "nn_pixels_exact_copies"}


def check(request: Request) -> None:
    """Raise UserError for what would end the target after hours of training: an option that cannot
    work, an imported run that is not the cell's model."""
    check_options(request.options._replace(metrics=request.target.metrics or ("offline",)))
    for name in request.target.cells:
        folder = files.join(request.root or "", name)
        if request.root and is_imported(folder):
            check_imported(request, name, checkpoints.read_config(folder) or {})


def references_for(request: Request, session: Session) -> dict:
    """{split: path} of reference statistics, made once into request.root/references."""
    found, name = {}, session.sources.name
    for split, source in session.sources.items():
        path = files.join(request.root, "references", f"{name}-{split}.npz")
        if not hosts.broadcast_json(files.exists(path)):
            say(f"reference statistics of {name}, {split}")
            make_reference(source, request.options._replace(metrics=("is",)), path, session,
                           num_features=10_000)
        found[split] = path
    return found


def _with_weights(request: Request, metrics) -> tuple:
    """The metrics that can be computed: offline instead of FID and IS without Inception's weights.
    Raises UserError where weights were named and cannot be read."""
    if not {"fid", "is"} & set(metrics):
        return metrics
    try:
        load_weights(request.options)
        return metrics
    except UserError as error:
        if request.options.inception_weights:
            raise
        say(f"no FID and IS here: {str(error).partition(' Looked for')[0]} (`ddpm inception check` "
            "lists where they are looked for); FD-cnn and FD-rand instead")
        return (*(m for m in metrics if m not in ("fid", "is")), "offline")


def run_cell(request: Request, name, *, stop, watchdog) -> figures.Run:
    """Train the cell, unless it was imported, then compute the target's values that it lacks.
    Raises StoppedError."""
    target, folder = request.target, str(files.resolve(f"{request.root}/{name}"))
    config, fields = cell_config(request, name), {}
    if hosts.broadcast_json(is_imported(folder)):
        say(f"{folder} was imported: its weights are taken as they are")
        fields = {field: value for field, value in flatten(config.to_dict()).items()
                  if field.startswith(("sampler.", "parallel.", "data.dir", "data.threads"))}
    elif not train(config, folder, stop=stop, watchdog=watchdog):
        raise StoppedError
    watchdog.pause()
    exp, params, step, facts = load_run(folder, overrides=fields)
    model = Model(exp, params, facts | {"workdir": folder})

    def new_session():
        return session_of(exp, folder=f"{folder}/evaluation/{step}", stop=stop, say=say)

    session = new_session()
    if target.chains:
        _evaluate_chains(request, model, step, new_session)
    else:
        _evaluate(request, model, step, session, by_own_sampler(config))

    def along(looks, shown):
        chosen = _with_weights(request, ("is", "fid"))
        reference = references_for(request, session)["train"] if "fid" in chosen else None
        options = request.options._replace(metrics=chosen, reference=reference)
        return evaluate_along(model, options, session, looks=looks, shown=shown)

    return figures.Run(exp, params, session.sources, _all_values(existing(folder)), along)


def _evaluate(request, model, step, session, counts):
    """The target's values that evaluation.json lacks, of samples by the config's sampler."""
    target, folder = request.target, model.facts["workdir"]
    # Process 0's folder decides, or processes would wait for each other for ever.
    values = hosts.broadcast_json(ours(existing(folder), VALUE_OF.values(), counts))
    metrics = target.metrics
    if values.get("step") == step:
        metrics = tuple(m for m in metrics if VALUE_OF[m] not in values)
    metrics = _with_weights(request, metrics)
    wanted = [(metrics, None)]
    if "fid" in metrics:
        paths = references_for(request, session)
        wanted = [(metrics, paths["train"])]
        if "test" in paths:
            wanted.append((("fid",), paths["test"]))
    for chosen, reference in wanted:
        if chosen:
            _record(model, step, session, request.options._replace(
                metrics=chosen, reference=reference,
                splits=wanted_splits(target, session.sources)))


def _evaluate_chains(request, model, step, new_session):
    """The values that evaluation.json lacks, of samples by each row of target.chains with each of
    its numbers of network calls; each compiles a program of its own."""
    folder, config = model.facts["workdir"], model.exp.config
    metrics = _with_weights(request, request.target.metrics)
    reference = references_for(request, new_session())["train"] if "fid" in metrics else None
    options = request.options._replace(metrics=metrics, reference=reference)
    wanted = [(chain, calls) for chain in request.target.chains for calls in chain.fids
              if calls <= config.diffusion.num_timesteps]
    for chain, calls in wanted:
        records = existing(folder).get(str(step), {}).get(options.protocol, {}).values()
        counts = by_chain(chain, calls)
        if hosts.broadcast_json(any(
                counts(r["provenance"]) and ("fid" in r["values"] or reference is None)
                for r in records)):
            continue
        changed = config.copy_and_resolve_references()
        override(changed, {f"sampler.{field}": value for field, value in (
            SAMPLER_DEFAULTS | chain.sampler | {"steps": calls}).items()})
        say(name_of(chain, calls))
        _record(model._replace(exp=model.exp._replace(config=changed)), step, new_session(),
                options, {DRAWN_BY: name_of(chain, calls)})


def _record(model, step, session, options, more=None):
    """Evaluate and write the results beside the run; more: provenance of what samples are by."""
    folder = model.facts["workdir"]
    with only_writer(folder, "--workdir"):
        records, drawn = evaluate_run(model, options, session)
        if hosts.is_main_process():
            records = [(label, values, facts | (more or {}) if "sampler" in facts else facts)
                       for label, values, facts in records]
            write_results(folder, step, options.protocol, records, drawn,
                          f"{files.resolve(folder).name}, {step}")


def _all_values(document) -> dict:
    """Every value of the newest step, for the figures."""
    found = {}
    for step in sorted(document, key=lambda s: int(s) if s.isdigit() else -1):
        for record in document[step].get("paper", {}).values():
            found |= record["values"]
    return found


def reproduce(request: Request, name: str, *, stop, watchdog) -> list[list]:
    """Run the target called `name`; write request.root/NAME.html and its pictures.

    -> the rows of targets.table_rows. Raises StoppedError after a stop signal.
    """
    check(request)
    rows, how = costs.cost_rows(request)
    sections = []
    for cell in request.target.cells:
        folder = f"{request.root}/{cell}"
        run = run_cell(request, cell, stop=stop, watchdog=watchdog)
        if request.target.figure:
            drawn = figures.FIGURES[request.target.figure].draw(run)
            sections += drawn.sections
            if hosts.is_main_process():
                for title, picture in drawn.pictures.items():
                    pictures.write_png(f"{request.root}/{name}-{title}.png",
                                       pictures.enlarge(picture, -(-320 // picture.shape[1])))
        if hosts.is_main_process():
            lines = f"{folder}/metrics.jsonl"
            if files.exists(lines):
                sections += html.curve_sections(run_log.read_metrics(lines))
            sections += html.evaluation_sections(existing(folder))
    found = targets.table_rows(request)
    if hosts.is_main_process():
        _write_page(request, f"{request.root}/{name}.html", found, sections, rows, how)
    return found


def _write_page(request, path, found, sections, rows, how):
    note = html.note(
        "The paper's values are the paper's. Bands are this project's." if request.is_paper else
        "Another config than the paper's: its values do not apply, so there is no verdict.")
    values = note
    if found:
        values = html.section("Values", note, html.table(found, targets.HEADER))
    cost = html.section("Cost", html.note(f"hours here: {how}"), html.table(rows, costs.HEADER))
    files.write_bytes(path, html.page(request.target.text, [values, *sections, cost]).encode())
    say(f"wrote {path}")
