"""Statistics of real images, with the facts that decide whether samples may be compared with them.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from etils import epath

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import moments
from ddpm_jax.formats import lazy, npy
from ddpm_jax.formats.torch_pickle import open_torch
from ddpm_jax.storage import files

TEXT = ("dataset", "split", "protocol", "weights_sha256", "images_sha256", "versions")
NAMES = (("mu", "m"), ("sigma", "s"))      # of mean and covariance, in files of other tools too
KNOWN = {"mu", "m", "sigma", "s", "pool_3", "n", "image_shape", "features", *TEXT}


class Reference(NamedTuple):
    """mu float64 [D], sigma float64 [D,D], n images; image_shape (H,W,C); features float32 [m,D] of
    m of the images or None. protocol, dataset, ... are None in a foreign file."""
    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None
    dataset: str | None = None
    split: str | None = None
    protocol: str | None = None
    weights_sha256: str | None = None
    images_sha256: str | None = None
    image_shape: tuple | None = None
    features: np.ndarray | None = None
    versions: str | None = None
    path: str | None = None


def identity(reference: Reference) -> str:
    """sha256 of the numbers: names the reference in a result."""
    digest = hashlib.sha256()
    digest.update(np.ascontiguousarray(reference.mu, "<f8").tobytes())
    digest.update(np.ascontiguousarray(reference.sigma, "<f8").tobytes())
    return digest.hexdigest()


def save(path, reference: Reference, *, overwrite: bool = False) -> None:
    """Raises UserError where the file exists."""
    if not str(path).endswith(".npz"):
        raise UserError(f"{path}: a reference must end in .npz")
    if files.exists(path) and not overwrite:
        raise UserError(f"{path} exists; name another file or add --overwrite")
    arrays = {"mu": np.asarray(reference.mu, np.float64),
              "sigma": np.asarray(reference.sigma, np.float64),
              "n": np.array(reference.n, np.int64),
              "image_shape": np.array(reference.image_shape, np.int64)}
    arrays |= {name: np.array(getattr(reference, name)) for name in TEXT}
    if reference.features is not None:
        arrays["features"] = np.asarray(reference.features, np.float32)
    files.write_npz(path, arrays)


def load(path) -> Reference:
    """A file of `save`, or of another tool (TTUR, pytorch-fid, EDM, torch-fidelity; an .npz with
    pool_3 features), without provenance. Nothing that is pickled in it is run."""
    if epath.Path(path).is_dir():
        raise UserError(f"--reference={path} is a folder: make statistics of its images once, "
                        f"`ddpm reference --dataset=folder --data_dir={path} --out=FILE.npz`")
    arrays = _read_npz(path) if str(path).endswith(".npz") else _read_pickle(path)
    mu, sigma = (next((arrays[name] for name in names if name in arrays), None)
                 for names in NAMES)
    if mu is None and sigma is None and "pool_3" in arrays:
        arrays = {"features": np.asarray(arrays["pool_3"], np.float32),
                  "n": len(arrays["pool_3"])}
        mu, sigma = moments.mean_and_cov(arrays["features"])
    missing = [names[0] for names, a in zip(NAMES, (mu, sigma), strict=True) if a is None]
    if missing:
        raise UserError(f"{path} has no {' and no '.join(missing)} (it has "
                        f"{', '.join(map(str, arrays)) or 'nothing'}): not reference statistics")
    mu, sigma = np.squeeze(np.asarray(mu, np.float64)), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: mu {mu.shape} and sigma {sigma.shape} do not fit; expected [D] "
                        "and [D,D]")
    if not (np.all(np.isfinite(mu)) and np.all(np.isfinite(sigma))):
        raise UserError(f"{path}: mu or sigma has a value that is not finite; make it again")
    facts = {name: str(arrays[name]) for name in TEXT if name in arrays}
    return Reference(
        mu, sigma, int(arrays["n"]) if "n" in arrays else None, **facts,
        image_shape=tuple(map(int, arrays["image_shape"])) if "image_shape" in arrays else None,
        features=arrays.get("features"), path=str(path))


def _read_npz(path) -> dict:
    """The arrays that `load` takes; of the others the names (some tools store images beside)."""
    try:
        with files.on_disk(path) as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] if name in KNOWN else None for name in archive.files}
    except UserError:
        raise
    except Exception as error:  # a damaged zip or array raises nearly anything
        raise UserError(f"{path} is not a readable .npz of plain arrays: {error}") from error


def _read_pickle(path) -> dict:
    """A mapping in a .npy, .pkl or .pt file; EDM2 has the statistics of FID below "fid"."""
    content = files.read_bytes(path)
    if content.startswith(b"\x93NUMPY"):
        found = npy.read_npy(content, path)
    else:
        try:
            found = npy.read_pickle(content, path)
        except UserError:
            if not content.startswith(b"PK"):
                raise
            found = {name: lazy.load(a) for name, a in open_torch(path, content).items()}
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no mapping with mu and sigma: not reference statistics")
    return found.get("fid", found)


def differences(reference: Reference, **expected) -> list[str]:
    """What differs from the samples' side; expected: fields of Reference, None: unknown."""
    return [f"{field} is {getattr(reference, field)!r}, the samples have {value!r}"
            for field, value in expected.items()
            if value is not None and getattr(reference, field) is not None
            and getattr(reference, field) != value]


def check(reference: Reference, *, force: bool = False, **expected) -> list[str]:
    """Warnings to print and store. UserError where they may not be compared and force is off."""
    found = differences(reference, **expected)
    if len(reference.mu) != 2048:
        raise UserError(f"{reference.path}: {len(reference.mu)}-d statistics; FID needs 2048 "
                        "(pool_3)")
    if found and not force:
        raise UserError(f"reference {reference.path} does not fit: {'; '.join(found)}; make one "
                        "with `ddpm reference`, or add --force for a number marked as forced")
    warnings = [f"forced: {text}" for text in found]
    if reference.protocol is None:
        warnings.append(f"{reference.path}: unknown protocol (no resize, precision or weights "
                        "stored with it); the number may not be comparable")
    return warnings
