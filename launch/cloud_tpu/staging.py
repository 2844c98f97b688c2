"""The folder that goes to every worker: wheel, configs, host.sh and a stamp that names them."""

import hashlib
import pathlib
import shutil
import zipfile

from cloud_tpu import REPO, LaunchError


def folder_of(o) -> pathlib.Path:
    return pathlib.Path(o.staging) / o.name / "ddpm"


def clear(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.whl"):
        path.unlink()


def copy_into(path, folder):
    (folder / path.name).write_bytes(path.read_bytes())


def stage(folder, ship):
    """Completes the folder that holds the wheel; `stamp` names its content."""
    copy_into(REPO / "launch" / "host.sh", folder)
    for source in [REPO / "configs", *map(pathlib.Path, ship)]:
        if source.is_dir():
            shutil.copytree(source, folder / source.name, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            copy_into(source, folder)
        elif source.name != "configs":
            raise LaunchError(f"--ship={source}: no such file")
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "stamp"):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        digest.update(_wheel_content(path) if path.suffix == ".whl" else path.read_bytes())
    [wheel] = folder.glob("*.whl")
    (folder / "stamp").write_text(f"{digest.hexdigest()}\n{wheel.name}\n")


def _wheel_content(path) -> bytes:
    """What is in a wheel; the file itself holds the time of its making as well."""
    with zipfile.ZipFile(path) as wheel:
        return b"".join(n.encode() + b"\0" + wheel.read(n) for n in sorted(wheel.namelist()))
