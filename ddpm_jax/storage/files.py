"""Files and folders, local or at an address such as gs://bucket/run, that appear whole or not at
all: written beside their place, flushed to the disk, then renamed."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pathlib
import secrets
import shutil
import tempfile

import numpy as np
from etils import epath

from ddpm_jax.errors import UserError

# gs:// goes through gcsfs (the extra [gcs]), whether or not TensorFlow is installed.
os.environ.setdefault("EPATH_USE_TF", "0")

PARTIAL = ".partial"  # ending of every temporary name; the name begins with a dot


def is_remote(path) -> bool:
    return "://" in str(path)


def resolve(path) -> epath.Path:
    """Absolute path, with ~ expanded; an address such as gs://bucket/run stays as it is.

    Raises UserError for a ~ of a user without a home, as some containers have.
    """
    text = str(path)
    if os.path.expanduser(text).startswith("~/"):
        raise UserError(f"{text}: this user has no home (HOME is not set); give a path without ~")
    return epath.Path(text if is_remote(text) else os.path.abspath(os.path.expanduser(text)))


def join(folder, *names) -> str:
    return "/".join([str(folder).rstrip("/"), *names])


def bucket_of(url) -> str:
    """gs://bucket/a/b -> gs://bucket"""
    scheme, _, rest = str(url).partition("://")
    return f"{scheme}://{rest.split('/')[0]}"


@contextlib.contextmanager
def storage_errors(path, doing, advice="free space or name another place"):
    """Turns what the disk, or a bucket's client, raises into one UserError with the remedy.

    Any exception of a client is meant (gcsfs raises its own, aiohttp's, requests' and
    google.auth's); on a disk only OSError, so that a mistake in the program keeps its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path) and not isinstance(error, OSError):
            raise
        raise UserError(f"cannot {doing} {path}: {_reason(path, error, advice)}") from error


def _reason(path, error, advice) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    if isinstance(error, ImportError):
        return f"{text}; pip install gcsfs"
    local = isinstance(error, OSError) and error.errno and not (
        is_remote(path) and isinstance(error, FileNotFoundError))
    if local or not is_remote(path):
        reason = getattr(error, "strerror", None) or text
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return f"{reason}; raise the limit with ulimit -n"
        place = str(getattr(error, "filename", None) or path)
        if place != str(path) and not place.endswith(PARTIAL):  # a folder above it, say
            reason += f" ({place})"
        return f"{reason}; {advice}" if advice else reason
    bucket = bucket_of(path)
    code = str(getattr(error, "code", ""))
    if code == "404" or isinstance(error, FileNotFoundError):
        return (f"nothing there, or no bucket {bucket}; gcloud storage ls {bucket} shows what "
                "there is, check the address")
    if code in ("401", "403") or any(w in text.lower() for w in ("forbidden", "anonymous",
                                                                "credential")):
        return (f"{text}; the account of this machine must be allowed to: gcloud storage buckets "
                f"add-iam-policy-binding {bucket} --member=serviceAccount:SA "
                "--role=roles/storage.objectUser (and the machine needs --scopes=cloud-platform)")
    return text


# ---- reading ----


def exists(path) -> bool:
    with storage_errors(path, "read", advice=""):
        return epath.Path(path).exists()


def check_no_file(folder, flag) -> None:
    """Raise UserError where ``flag`` names a file in the place of a folder."""
    place = resolve(folder)
    if place.exists() and not place.is_dir():
        raise UserError(f"{flag}={folder} is a file; name a folder")


def check_no_folder(file, flag) -> None:
    """Raise UserError where ``flag`` names a folder in the place of a file, or lies in a file."""
    place = resolve(file)
    if is_remote(place):
        return
    if place.is_dir():
        raise UserError(f"{flag}={file} is a folder; name a file")
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{flag}={file} lies in {above}, which is a file; name another")


def listing(folder) -> list:
    """Names in a folder, sorted; [] where there is none."""
    with storage_errors(folder, "list", advice=""):
        folder = epath.Path(folder)
        return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def read_bytes(path) -> bytes:
    """The file's bytes; UserError where it cannot be read."""
    with storage_errors(path, "read", advice=""):
        return epath.Path(path).read_bytes()


def on_disk(path):
    """The file, opened for reading; one at an address is copied to a temporary file."""
    with storage_errors(path, "read", advice=""):
        if not is_remote(path):
            return open(path, "rb")
        copy = tempfile.TemporaryFile()
        with epath.Path(path).open("rb") as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
        return copy


def read_npz(path) -> dict:
    """{name: array}; UserError where the file is no npz. Pickled objects are refused."""
    content = read_bytes(path)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("a member is not an array")
        return arrays
    except Exception as error:  # a damaged zip or array raises nearly anything
        raise UserError(f"{path} is not a readable .npz of plain arrays: {error}") from error


def read_json(path):
    """The value; UserError where the file is no JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; move it away") from error


# ---- writing ----


class _Raw(io.FileIO):
    """A new file; what cannot be written to it is a UserError naming ``path``."""

    def __init__(self, local, path):
        with storage_errors(path, "write"):
            super().__init__(local, "xb")
        self._path = path

    def write(self, data):
        with storage_errors(self._path, "write"):
            return super().write(data)


@contextlib.contextmanager
def _new_file(local, path):
    """`_Raw`, buffered, also where a library writes to its name. Other errors inside are left as
    they are: they may be of a file that is read."""
    try:
        with io.BufferedWriter(_Raw(local, path)) as file:
            yield file
    except OSError as error:
        if str(error.filename) == str(local) or error.errno in (
                errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            with storage_errors(path, "write"):
                raise
        raise


@contextlib.contextmanager
def whole_file(path):
    """Opens ``path`` for writing bytes; readers see the old file or the new one, whole.

    Makes the folder. A library that needs a name writes to that of the file, which for an address
    lies on this machine until it is sent. UserError where it cannot be written; errors of the
    caller keep their type. After any error no trace is left.
    """
    target = epath.Path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="ddpm_send_") as folder:
            local = pathlib.Path(folder, "file")
            with _new_file(local, local) as file:
                yield file
            with storage_errors(path, "write"):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(local.read_bytes())
        return
    temporary = target.parent / f".{target.name[:40]}.{secrets.token_hex(4)}{PARTIAL}"
    try:
        with storage_errors(path, "write"):
            target.parent.mkdir(parents=True, exist_ok=True)
        with _new_file(temporary, path) as file:
            yield file
        with storage_errors(path, "write"):
            _sync(temporary)
            os.replace(temporary, target)
            _sync_names(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path):
    """Flushes a file, or the names in a folder, to the disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sync_names(folder):
    with contextlib.suppress(OSError):  # it may be one that cannot be listed
        _sync(folder)


def write_bytes(path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


def write_json(path, value, **options) -> None:
    """Strict JSON: a NaN or an infinity is a ValueError. options: other than the defaults, of
    ``json.dumps``."""
    text = json.dumps(value, **{"indent": 1, "sort_keys": True, "allow_nan": False, **options})
    write_bytes(path, f"{text}\n".encode())


def write_npz(path, arrays: dict) -> None:
    """{name: array}, uncompressed."""
    with whole_file(path) as file:
        np.savez(file, **arrays)


def remove(path) -> None:
    """A file or folder with all in it; nothing where there is none."""
    with storage_errors(path, "remove", advice=""):
        path = epath.Path(path)
        if path.is_dir() and not os.path.islink(path):
            path.rmtree()
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(out, advice="take another"):
    """Yields a folder beside ``out`` that takes its name at the end; after an error none is left.

    ``out`` may exist if it is empty. A bucket has no rename: there ``out`` itself is yielded, and
    the caller writes last what readers know it by. UserError, ending with ``advice``, where
    ``out`` has something in it or cannot be written.
    """
    out = resolve(out)
    with storage_errors(out, "write", advice):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty folder: remove it, or {advice}")
    if is_remote(out):
        try:
            yield out
        except BaseException:
            out.rmtree(missing_ok=True)
            raise
        return
    with storage_errors(out, "write", advice), staging_folder(out) as staging:
        yield staging
        for path in (*pathlib.Path(staging).rglob("*"), staging):
            _sync(path)
        os.replace(staging, out)
        _sync_names(out.parent)


@contextlib.contextmanager
def staging_folder(out):
    """Yields a new folder beside a local path and removes it at the end; what killed processes left
    of theirs for this path is removed before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    staging = out.parent / f".{out.name}.{secrets.token_hex(4)}{PARTIAL}"
    staging.mkdir()
    lock = os.open(staging, os.O_RDONLY)
    try:
        _lock(lock)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _lock(descriptor) -> bool:
    """Whether the folder is locked now, until it is closed or its process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process's, or a file system without locks
        return False
    return True


def _remove_abandoned(out) -> None:
    """Removes the folders of processes that ended: they are not locked."""
    for entry in os.scandir(out.parent):
        if (entry.name.startswith(f".{out.name}.") and entry.name.endswith(PARTIAL)
                and entry.is_dir(follow_symlinks=False)):
            with contextlib.suppress(OSError):  # another process was faster
                descriptor = os.open(entry.path, os.O_RDONLY)
                try:
                    if _lock(descriptor):
                        shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(descriptor)
