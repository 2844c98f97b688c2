"""evaluation.json (values with their provenance, by step, protocol and label), the pictures and
evaluation.html beside it."""

import contextlib

import jax
from etils import epath

from ddpm_jax import run_log
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import html_report
from ddpm_jax.parallel import hosts
from ddpm_jax.storage import files
from ddpm_jax.storage.lock import Lock
from ddpm_jax.storage.pictures import write_png

LOCK_NAME = "evaluate.lock.json"


def versions() -> dict:
    device = jax.devices()[0]
    return hosts.versions() | {"device": device.device_kind, "devices": jax.device_count()}


@contextlib.contextmanager
def only_writer(out, flag: str):
    """Around an evaluation whose results go to the folder ``out`` (None: nowhere), which ``flag``
    names. UserError on all processes where another evaluation has it; training may go on there.
    """
    lock = out and hosts.on_main_process(Lock, out, flag, run_log.say, LOCK_NAME)
    try:
        yield
    finally:
        if lock:
            lock.release()


def read_records(path) -> dict:
    """evaluation.json: {step: {protocol: {label: {values, provenance}}}}; {} where there is none.
    Raises UserError where it is damaged or its folder is a file."""
    folder = epath.Path(path).parent
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={folder} is a file; name a folder")
    document = files.read_json(path) if files.exists(path) else {}
    if not isinstance(document, dict):
        raise UserError(f"{path} is not the JSON of an evaluation; move it away")
    return document


def write_records(path, step, protocol: str, records) -> dict:
    """Adds to evaluation.json. -> all of it."""
    document = read_records(path)
    at = document.setdefault(str(step), {}).setdefault(protocol, {})
    for label, values, provenance in records:
        old = at.get(label, {}).get("values", {})
        at[label] = {"values": old | values, "provenance": provenance | {"versions": versions()}}
    files.write_json(path, document)
    return document


def write_results(out, step, protocol: str, records, pictures, title: str) -> None:
    """evaluation.json, pictures (whole samples as samples.npz) and evaluation.html in the folder
    ``out``. Call on process 0."""
    document = write_records(files.join(out, "evaluation.json"), step, protocol, records)
    pictures = dict(pictures)
    samples = pictures.pop("samples", None)
    if samples is not None:
        files.write_npz(files.join(out, "samples.npz"), {"arr_0": samples})
    for name, picture in pictures.items():
        write_png(files.join(out, f"{name}.png"), picture)
    lines = files.join(out, "metrics.jsonl")
    history = run_log.read_metrics(lines) if files.exists(lines) else []
    page = html_report.page(title, [*html_report.evaluation_sections(document),
                                    *html_report.curve_sections(history),
                                    *html_report.picture_sections(pictures)])
    files.write_bytes(files.join(out, "evaluation.html"), page.encode())


def shown(step, protocol: str, records) -> dict:
    """What evaluation.json got, without long lists."""
    return {str(step): {protocol: {
        label: {k: v for k, v in values.items() if not isinstance(v, list) or len(v) < 20}
        for label, values, _ in records}}}
