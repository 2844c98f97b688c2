"""Whole files or none: results are written beside their place and moved there when complete."""

import io
import json
import os
import shutil

import numpy as np

from ddpm_jax.errors import UserError


def _remote(path):
    return "://" in str(path)


def _path(path):
    if _remote(path):
        from etils import epath  # noqa: PLC0415
        return epath.Path(path)
    import pathlib
    return pathlib.Path(path)


def exists(path) -> bool:
    return _path(path).exists()


def join(folder, *names) -> str:
    return "/".join([str(folder).rstrip("/"), *names])


def listing(folder) -> list:
    """Names in a folder, sorted; [] where there is none."""
    folder = _path(folder)
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def remove(path) -> None:
    """A file or folder with all in it; nothing where there is none."""
    path = _path(path)
    if path.is_dir():
        path.rmtree() if hasattr(path, "rmtree") else shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def read_bytes(path) -> bytes:
    """The file's bytes; UserError where it cannot be read."""
    try:
        return _path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def write_bytes(path, content: bytes) -> None:
    """The file appears complete or not at all (a store of objects does that by itself)."""
    target = _path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _remote(path):
            target.write_bytes(content)
            return
        temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or name "
                        "another place") from error


def write_npz(path, arrays: dict) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_npz(path) -> dict:
    """{name: array}; UserError where the file is no npz. Pickled objects are refused."""
    content = read_bytes(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:
        raise UserError(f"{path} is not a readable .npz of plain arrays: {error}") from error


def write_json(path, value) -> None:
    """Strict JSON: a NaN or an infinity is an error, never a value in a result."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def read_json(path):
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; move it away") from error
