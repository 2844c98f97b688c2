"""Programs of this project as files that compilers read: the corpus of `ddpm bench corpus`.

Each program is written twice: as HLO text before optimisation, with its large constants and without
metadata, which XLA's own tools open, and as a portable StableHLO artifact for the widest window of
versions, which every jaxlib since 0.4.34 compiles. Both are for one device, without shardings.
"""

import hashlib
import json
import pathlib
import re
from typing import NamedTuple

import jax
from jax._src.lib import _jax  # portable artifacts and HLO text have no public writer
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import hlo as dialect

from ddpm_jax import experiment
from ddpm_jax.benchmark import compiled
from ddpm_jax.compilation import report
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files

MANIFEST = "manifest.json"
METADATA = re.compile(r', metadata=\{(?:[^{}"]|"[^"]*")*\}')


class Entry(NamedTuple):
    """One program. name: of its files; program: a row of compiled.PROGRAMS; examples: images of the
    data set on the device; targets: what it is compiled for; settings: fields of the config."""

    name: str
    config: str
    program: str
    targets: tuple[str, ...] = ("cpu",)
    examples: int = 1024
    settings: dict = {}


ONE_STEP = {"parallel.runner": "jit", "train.clip_scope": "global", "train.steps_per_dispatch": 1}
# A corpus stays what it was made as: the digits of its day, whatever configs/digits.py is tuned to.
DIGITS = ONE_STEP | {
    "model.dropout": 0.05, "diffusion.num_timesteps": 100, "diffusion.predict": "eps",
    "diffusion.variance": "fixed_small", "diffusion.loss": "mse",
    "diffusion.schedule": {"name": "linear", "beta_start": 1e-4, "beta_end": 0.2},
    "train.batch_size": 64, "optimizer.learning_rate": 1e-3, "optimizer.warmup_steps": 100,
    "optimizer.decay_steps": 0, "ema.decay": 0.995, "sampler.batch_size": 64}
SMALL_CIFAR = ONE_STEP | {"train.batch_size": 8}
ENTRIES = (
    Entry("ddpm_digits_flax_f32_train_step", "digits", "train_step", settings=DIGITS),
    Entry("ddpm_digits_flax_f32_sample", "digits", "sample", settings=DIGITS),
    Entry("ddpm_digits_flax_f32_bits_per_dim", "digits", "evaluate", settings=DIGITS),
    Entry("ddpm_cifar10_flax_f32_train_step", "cifar10", "train_step", settings=SMALL_CIFAR),
    Entry("ddpm_cifar10_flax_bf16_train_step", "cifar10", "train_step", ("h100", "v5e"), 50_000,
          ONE_STEP | {"train.batch_size": 128, "model.dtype": "bfloat16"}))


def _plain(fn, args, results, donate=()):
    """Runner.compile for one device, without shardings, which old compilers read differently."""
    del args, results
    return jax.jit(fn, donate_argnums=donate)


def lower(entry: Entry, config):
    """A program of ``config`` with the entry's settings, lowered for one device of this CPU."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(entry.settings)
    exp = experiment.build_model(config, jax.devices("cpu")[:1])
    runner = exp.runner._replace(compile=_plain, abstract=lambda kind, tree: tree,
                                 constrain=lambda x: x)
    made = compiled.PROGRAMS[entry.program](exp._replace(runner=runner), entry.examples)
    return made.jitted.lower(*made.args)


def artifact(lowered) -> bytes:
    """The program as versioned StableHLO bytecode (VHLO) for the widest window of versions, without
    source locations, so that its bytes depend on the program alone."""
    module = lowered.compiler_ir("stablehlo")
    version = dialect.get_version_from_compatibility_requirement(
        dialect.StablehloCompatibilityRequirement.MAX)
    with module.context:
        bare = ir.Module.parse(module.operation.get_asm(enable_debug_info=False))
        return _jax.mlir.serialize_portable_artifact(bare, version, True)


def hlo_text(lowered) -> str:
    """HLO before optimisation, with large constants and without metadata."""
    text = lowered.compiler_ir("hlo").as_hlo_text(print_large_constants=True)
    return METADATA.sub("", text)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_other(file, content: bytes) -> bool:
    return file.exists() and file.read_bytes() != content


def write(folder, load_config, entries=ENTRIES, texts=True, overwrite=False) -> list[str]:
    """Write every entry and the manifest into ``folder``. -> one line a program: new, unchanged, or
    changed against the manifest that was there, with the versions that it was made with.

    load_config(name) -> config; texts: HLO text too, which takes several MB a program. Raises
    UserError, with nothing written, where a file in ``folder`` or its manifest is of another
    program and ``overwrite`` is not set.
    """
    folder = pathlib.Path(folder)
    before = {r["name"]: r for r in read(folder)} if (folder / MANIFEST).exists() else {}
    rows, lines, made, differing = [], [], {}, []
    for entry in entries:
        lowered = lower(entry, load_config(entry.config))
        contents = {f"{entry.name}.mlir.bc": artifact(lowered),
                    f"{entry.name}.hlo": hlo_text(lowered).encode()}
        hashes = {name: {"sha256": digest(c), "bytes": len(c)} for name, c in contents.items()}
        old = before.get(entry.name)
        changed = [n for n, h in hashes.items() if old and old["files"].get(n) != h]
        kept = {n: c for n, c in contents.items() if texts or not n.endswith(".hlo")}
        made |= kept
        differing += changed or [n for n, c in kept.items() if _is_other(folder / n, c)]
        rows.append({**entry._asdict(), "targets": list(entry.targets), "files": hashes,
                     "versions": old["versions"] if old and not changed else report.versions()})
        if old is None:
            lines.append(f"{entry.name}: new")
        else:
            versions = f"made with jax {old['versions']['jax']}, now {jax.__version__}"
            lines.append(f"{entry.name}: {'changed' if changed else 'unchanged'} ({versions})"
                         + (f": {', '.join(changed)}" if changed else ""))
    if differing and not overwrite:
        raise UserError(f"corpus: {folder} holds other programs under these names: "
                        f"{', '.join(differing)}; name a new folder with --corpus, or replace them "
                        "with --overwrite")
    for name, content in made.items():
        files.write_bytes(folder / name, content)
    files.write_json(folder / MANIFEST, rows, sort_keys=False)
    return lines


def read(folder) -> list[dict]:
    """Rows of the manifest in ``folder``; UserError where there is none."""
    file = pathlib.Path(folder) / MANIFEST
    try:
        rows = json.loads(file.read_text())
        if not all({"name", "files", "targets"} <= set(r) for r in rows):
            raise ValueError("not a manifest")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"corpus: {file} cannot be read ({error}); ddpm bench corpus "
                        "--corpus=NEW_FOLDER writes one") from None
    return rows


def check(folder, row: dict) -> str:
    """The hash of a program's artifact; UserError where it is not the file of its manifest row."""
    name = f"{row['name']}.mlir.bc"
    found = digest(files.read_bytes(pathlib.Path(folder) / name))
    if found != row["files"].get(name, {}).get("sha256"):
        raise UserError(f"corpus: {pathlib.Path(folder) / name} is not the file of {MANIFEST} "
                        f"(sha256 {found[:12]}); restore it, or write a corpus of your own with "
                        "ddpm bench corpus --corpus=NEW_FOLDER")
    return found
