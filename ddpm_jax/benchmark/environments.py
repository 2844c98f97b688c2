"""Folders with a release of jaxlib or JAX for PYTHONPATH: what `ddpm bench history` runs."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from ddpm_jax.errors import UserError
from ddpm_jax.storage import files

NEEDED = ("numpy", "ml_dtypes", "scipy")  # by a jaxlib without JAX
ROOT = pathlib.Path(__file__).resolve().parents[2]
H100 = pathlib.Path(__file__).resolve().parent.parent / "compilation/h100.txtpb"


def version_key(release: str) -> tuple[int, ...]:
    return tuple(int(word) for word in re.findall(r"\d+", release))


def interpreter(python: str | None) -> str:
    """The path of a Python, None for this one; UserError where it is none that runs."""
    found = shutil.which(python) if python else sys.executable
    if not found:
        raise UserError(f"python: {python!r} is not found; give its path")
    try:
        done = subprocess.run([found, "-c", "import sys; print(sys.version_info >= (3, 9))"],
                              capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"python: {found} does not run ({error})") from None
    if done.stdout.strip() != "True":
        raise UserError(f"python: {found} is no Python 3.9 or newer; give the path of one")
    return found


def listed(python: str) -> tuple[str, ...]:
    """The releases of jaxlib that the package index has for ``python``, oldest first.

    Raises UserError where it cannot be asked.
    """
    done = subprocess.run([python, "-m", "pip", "index", "versions", "jaxlib"],
                          capture_output=True, text=True, check=False)
    found = re.search(r"Available versions: (.*)", done.stdout)
    if not found:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"releases: `{python} -m pip index versions jaxlib` fails ({last}); give "
                        "a list, such as --releases=0.10.1,0.10.2")
    return tuple(sorted((r.strip() for r in found[1].split(",")), key=version_key))


def install(python: str, folder: pathlib.Path, packages, *, dependencies=False) -> None:
    """Packages into a folder of their own, for PYTHONPATH, by uv where there is one, else by pip.

    Raises UserError with the installer's last line.
    """
    uv = shutil.which("uv")
    words = [uv, "pip", "install", "-q", "--python", python] if uv else [
        python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    words += ["--target", str(folder), *([] if dependencies else ["--no-deps"]), *packages]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"cannot install {' '.join(packages)}: {(lines or ['no message'])[-1]}")


def _shared(python: str, folder: pathlib.Path, packages, *, dependencies=False) -> None:
    """``install`` of what all releases share, once, whole or not at all: an installation that was
    cut off is not taken for one."""
    if folder.exists():
        return
    with files.staging_folder(folder) as staging:
        made = staging / "made"
        install(python, made, packages, dependencies=dependencies)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(made, folder)


# ---- an accelerator's compiler ----


def _install_cuda(python: str, folder: pathlib.Path, release: str) -> None:
    install(python, folder, [f"jax-cuda12-pjrt=={release}"])


def _install_libtpu(python: str, folder: pathlib.Path, release: str) -> None:
    """The libtpu that JAX of this release pins."""
    install(python, folder, [f"jax=={release}"])
    [metadata] = folder.glob("jax-*.dist-info/METADATA")
    pinned = re.search(r"^Requires-Dist: (libtpu)\s*\(?([^);]*)\)?\s*;.*tpu", metadata.read_text(),
                       re.MULTILINE)
    if not pinned:
        raise UserError(f"jax {release} pins no libtpu")
    install(python, folder, [f"libtpu{pinned[2].strip()}"])


class Plugin(NamedTuple):
    """install(python, folder, release); library: in the folder; options: further flags of
    replay.py."""

    install: Callable
    library: str
    options: tuple[str, ...] = ()


PLUGINS = {
    "h100": Plugin(_install_cuda, "jax_plugins/xla_cuda12/xla_cuda_plugin.so", (f"--gpu={H100}",)),
    "v5e": Plugin(_install_libtpu, "libtpu/libtpu.so")}


# ---- environments ----


def jaxlib(python: str, release: str, folder: pathlib.Path, shared: pathlib.Path, targets) -> dict:
    """A jaxlib alone, in ``folder``; what it needs, in ``shared``. -> environment variables."""
    _shared(python, shared / "needed", NEEDED)
    install(python, folder, [f"jaxlib=={release}"])
    for target in targets:
        if target in PLUGINS:
            with contextlib.suppress(UserError):  # its row will be an error: there is no plugin
                PLUGINS[target].install(python, folder, release)
    return {"PYTHONPATH": f"{folder}:{shared / 'needed'}"}


def jax(python: str, release: str, folder: pathlib.Path, shared: pathlib.Path, targets) -> dict:
    """A JAX and its jaxlib before everything else that this project needs."""
    del targets
    if not (ROOT / "setup.cfg").exists():
        raise UserError("the history of the source needs a checkout of it; this is an installed "
                        "package")
    _shared(python, shared / "project", [str(ROOT)], dependencies=True)
    install(python, folder, [f"jax=={release}", f"jaxlib=={release}"])
    return {"PYTHONPATH": f"{folder}:{ROOT}:{shared / 'project'}", "JAX_COMPILATION_CACHE_DIR": "",
            "JAX_PLATFORMS": "cpu"}
