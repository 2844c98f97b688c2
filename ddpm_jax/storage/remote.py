"""Prepared data on gs:// (any address that fsspec opens): read in place, or staged once a host.

Arrays (what `prepare.write_store` makes) are read in place. Files that only local readers open
(TFDS's array_record) are staged: downloaded below `stage_dir()`, complete or not at all, by the
process of a host that comes first, while the others of that host wait.
"""

import base64
import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import threading

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.storage.files import PARTIAL, is_remote, join, storage_errors, whole_file


def open_at(url):
    """-> (fsspec's file system, the path in it). UserError where the extra [gcs] is missing."""
    with storage_errors(url, "read"):
        import fsspec
        return fsspec.core.url_to_fs(str(url))


def listing(url) -> dict:
    """{name relative to url: (bytes, md5 in hex or '', tag that changes with the content)}.

    {} where there is nothing below url; UserError where there is no bucket, or no permission.
    """
    fs, root = open_at(url)
    with storage_errors(url, "list"):
        fs.invalidate_cache()
        found = fs.find(root, detail=True)
    files = {}
    for path, facts in sorted(found.items()):
        name = path[len(root):].strip("/")
        md5 = facts.get("md5Hash") or ""
        tag = md5 or str(facts.get("etag") or facts.get("generation") or facts.get("mtime") or "")
        if name and not path.endswith("/"):
            files[name] = (int(facts["size"]),
                           base64.b64decode(md5).hex() if md5 else "", tag)
    return files


def read_bytes(url, start=None, end=None) -> bytes:
    """The file at url, or its bytes start ... end-1."""
    fs, path = open_at(url)
    with storage_errors(url, "read"):
        return fs.cat_file(path, start=start, end=end)


# ---- arrays, in place ----


class RemoteArray:
    """A .npy file of uint8 [N, ...] at url. array[i] reads one row; whole() reads all.

    Below `keep` bytes the first read fetches the file and keeps it in memory. For any thread.
    """

    def __init__(self, url, keep: int):
        self._url, self._lock, self._all = url, threading.Lock(), None
        head = io.BytesIO(read_bytes(url, 0, 4096))
        try:
            version = np.lib.format.read_magic(head)
            self.shape, fortran, self.dtype = getattr(
                np.lib.format, f"read_array_header_{version[0]}_{version[1]}")(head)
        except Exception as error:  # numpy parses the header as Python
            raise UserError(f"{url}: not an array of numpy ({error}); prepare it again") from error
        if fortran or self.dtype != np.uint8:
            raise UserError(f"{url}: not the uint8 array that ddpm writes; prepare it again")
        self._offset, self._row = head.tell(), int(np.prod(self.shape[1:]))
        self._keep = len(self) * self._row < keep

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i) -> np.ndarray:
        if self._keep:
            return self.whole()[i]
        return self._fetch(i, i + 1)[0]

    def whole(self) -> np.ndarray:
        """uint8 [N, ...]"""
        if not self._keep:
            return self._fetch(0, len(self))
        with self._lock:  # sixteen threads ask at once
            if self._all is None:
                self._all = self._fetch(0, len(self))
        return self._all

    def _fetch(self, first, last):
        size = (last - first) * self._row
        start = self._offset + first * self._row
        data = read_bytes(self._url, start, start + size)
        if len(data) != size:
            raise UserError(f"{self._url}: cut short at image {first + len(data) // self._row} of "
                            f"{len(self)}; prepare it, or copy it, again")
        return np.frombuffer(data, np.uint8).reshape(last - first, *self.shape[1:])


# ---- staging ----


def stage_dir() -> pathlib.Path:
    """$DDPM_STAGE_DIR, else `staged` in the default folder of the data."""
    default = os.environ.get("DDPM_DATA_DIR") or "~/.cache/ddpm_jax/data"
    if is_remote(default):
        default = "~/.cache/ddpm_jax/data"
    return pathlib.Path(os.environ.get("DDPM_STAGE_DIR") or f"{default}/staged").expanduser()


def stage(url, folder: str) -> pathlib.Path | None:
    """A local folder that holds `folder` (such as celeb_a_hq/256) with all files of url/folder.

    Downloads what is not there yet; a download that was cut off goes on with the files that are
    missing. Changed files in the bucket are another stage. None where there is nothing at
    url/folder. Raises UserError: no bucket, no permission, no space, a file that changes meanwhile.
    """
    source = join(url, folder)
    files = listing(source)
    if not files:
        return None
    content = json.dumps([source, files], sort_keys=True)
    target = stage_dir() / hashlib.sha256(content.encode()).hexdigest()[:16]
    if target.exists():
        return target
    with storage_errors(stage_dir(), "write to"):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(f"{target.name}.lock"), "a")  # noqa: SIM115
    with lock:
        _acquire(lock, source)
        # The lock ends with its process, whatever kills it: the next one goes on here.
        if not target.exists():
            part = target.with_name(f"{target.name}{PARTIAL}")
            _download(source, part / folder, files)
            os.replace(part, target)
    return target


def _say(text):
    print(f"ddpm: {text}", file=sys.stderr, flush=True)


def _acquire(lock, source):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say(f"another process of this host stages {source}: waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _download(source, folder, files):
    missing = {name: facts for name, facts in files.items() if not (folder / name).exists()}
    need = sum(size for size, *_ in missing.values())
    with storage_errors(folder, "write to"):
        folder.mkdir(parents=True, exist_ok=True)
        for cut_off in folder.rglob(f".*{PARTIAL}"):  # by a process that was killed
            cut_off.unlink()
        free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"data.dir: staging {source} needs {need / 1e9:.1f} GB in {stage_dir()}, "
                        f"{free / 1e9:.1f} GB are free; set DDPM_STAGE_DIR to a larger disk")
    there = f", {len(files) - len(missing)} there already" if len(missing) < len(files) else ""
    _say(f"staging {source} ({len(missing)} files, {need / 1e6:,.1f} MB{there}) in {folder}")
    fs, root = open_at(source)
    for name, (size, md5, _) in missing.items():
        with storage_errors(join(source, name), "stage"):
            with whole_file(folder / name) as file:
                fs.get_file(join(root, name), file.name)
                if not _holds(pathlib.Path(file.name), size, md5):
                    raise UserError(f"{join(source, name)} is not what the bucket announced "
                                    "(changed meanwhile, or damaged on the way); start again")


def _holds(path, size, md5) -> bool:
    """Whether a file is what `listing` says; md5 may be ''."""
    return path.stat().st_size == size and (not md5 or _md5(path) == md5)


def _md5(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def upload(folder: pathlib.Path, url, last) -> None:
    """All files below `folder` to url; those named in `last`, by which readers know it, last.

    Raises UserError, before those in `last`, where the bucket holds something else than was sent.
    """
    fs, root = open_at(url)
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    for late in (False, True):
        batch = {n: p for n, p in sorted(paths.items()) if (p.name in last) == late}
        for name, path in batch.items():
            with storage_errors(url, "write to"):
                fs.put_file(str(path), join(root, name))
        there = listing(url)
        for name, path in batch.items():
            # gcsfs leaves open where a small file that ends in \r ends.
            size, md5, _ = there.get(name, (-1, "", ""))
            if not _holds(path, size, md5):
                raise UserError(f"{join(url, name)} is not what was sent (damaged on the way, or "
                                "written by another process); start again")
