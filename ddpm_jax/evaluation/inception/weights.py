"""Inception's weights: where they are looked for, how they are read, converted and verified.

Reads the .pth of pytorch-fid and torch-fidelity and TensorFlow's frozen graph (.pb, .tgz) with
``ddpm_jax.formats``, which needs neither PyTorch nor TensorFlow and executes nothing in a file.
"""

import hashlib
import io
import os
import struct
from typing import NamedTuple

import jax
import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.inception import network
from ddpm_jax.formats import archives, protobuf, torch_pickle
from ddpm_jax.storage import files

ENVIRONMENT = "DDPM_JAX_INCEPTION"
CONVERTED_NAME = "inception-2015-12-05.npz"
PTH_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PTH_BYTES = 95_628_359
URLS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
)
TGZ_URL = "http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz"
KNOWN_SOURCES = {PTH_SHA256: "pt_inception-2015-12-05-6726825d.pth"}
FINGERPRINT_SEED = 20151205


class Weights(NamedTuple):
    """params: of `network.features`; state_sha256: of the tensors, the same for .pth and .pb."""
    params: dict
    state_sha256: str
    source_sha256: str
    path: str
    fingerprint: np.ndarray | None


def _tensor(message):
    """float32 array of a TensorProto, or None for another dtype."""
    dtype, shape, content, values = 0, [], b"", []
    for field, value in protobuf.fields(message):
        if field == 1:
            dtype = value
        elif field == 2:
            shape = [protobuf.signed(dict(protobuf.fields(dim)).get(1, 0))
                     for number, dim in protobuf.fields(value) if number == 2]
        elif field == 4:
            content = value
        elif field == 5:
            values.append(np.frombuffer(protobuf.content(value), "<f4"))
    if dtype != 1:
        return None
    flat = np.frombuffer(content, "<f4") if content else (
        np.concatenate(values) if values else np.zeros(1, np.float32))
    size = int(np.prod(shape, dtype=np.int64))
    return (np.full(size, flat[0], np.float32) if flat.size == 1 else flat).reshape(shape)


def read_graph(content: bytes) -> tuple[dict, dict]:
    """GraphDef -> ({name: array of each float Const}, {name: {attribute: value}} of norms)."""
    constants, norms = {}, {}
    for field, node in protobuf.fields(content):
        if field != 1:
            continue
        name = op = ""
        attributes = {}
        for part, value in protobuf.fields(node):
            if part == 1:
                name = protobuf.text(value)
            elif part == 2:
                op = protobuf.text(value)
            elif part == 5:
                entry = dict(protobuf.fields(value))
                attributes[protobuf.text(entry[1])] = dict(protobuf.fields(entry.get(2, b"")))
        if op == "Const" and 8 in attributes.get("value", {}):
            array = _tensor(attributes["value"][8])
            if array is not None:
                constants[name] = array
        elif op == "BatchNormWithGlobalNormalization":
            norms[name] = {key: next(iter(value.values()), 0) for key, value in attributes.items()}
    return constants, norms


def graph_names() -> dict:
    """{torchvision's name: the 2015 graph's scope} of the 94 convolutions.

    The graph numbers what it meets: conv, conv_1 ... and mixed, mixed_1 ...; in a block a branch
    of one convolution has no scope, the others are tower, tower_1 ...; a fork inside is `mixed`.
    """
    names = {}

    def numbered(base, n):
        return base if n == 0 else f"{base}_{n}"

    def walk_branch(steps, prefix, scope):
        n = 0
        for step in steps:
            if isinstance(step, network.Conv):
                names[prefix + step.name] = scope + numbered("conv", n)
                n += 1
            elif isinstance(step, network.Split):
                for m, branch in enumerate(step.branches):
                    names[prefix + branch[0].name] = scope + "mixed/" + numbered("conv", m)

    blocks = [s for s in network.LAYERS if isinstance(s, network.Split)]
    walk_branch([s for s in network.LAYERS if isinstance(s, network.Conv)], "", "")
    for b, block in enumerate(blocks):
        scope, towers = numbered("mixed", b) + "/", 0
        for branch in block.branches:
            if len(branch) == 1:
                walk_branch(branch, block.name + ".", scope)
            else:
                walk_branch(branch, block.name + ".", scope + numbered("tower", towers) + "/")
                towers += 1
    return names


def _read_pb(content, path):
    try:
        constants, norms = read_graph(content)
        epsilons = {name: struct.unpack("<f", norm["variance_epsilon"])[0]
                    for name, norm in norms.items() if "variance_epsilon" in norm}
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise UserError(f"{path}: not a TensorFlow GraphDef, or damaged: {error}") from error
    for name, epsilon in epsilons.items():
        if abs(epsilon - network.BN_EPSILON) > 1e-6:
            raise UserError(f"{path}: {name}: batch norm's epsilon is {epsilon:g}, not "
                            f"{network.BN_EPSILON}: another graph")
    state = {}
    parts = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean",
             "running_var": "moving_variance"}
    wanted = {f"{ours}.conv.weight": f"{theirs}/conv2d_params"
              for ours, theirs in graph_names().items()}
    wanted |= {f"{ours}.bn.{a}": f"{theirs}/batchnorm/{b}"
               for ours, theirs in graph_names().items() for a, b in parts.items()}
    wanted |= {"fc.weight": "softmax/weights", "fc.bias": "softmax/biases"}
    missing = [theirs for theirs in wanted.values() if theirs not in constants]
    if missing:
        raise UserError(f"{path}: the graph lacks {len(missing)} constants, first {missing[0]!r}: "
                        "not classify_image_graph_def.pb")
    for ours, theirs in wanted.items():
        array = constants[theirs]
        if ours == "fc.weight":
            array = array.T
        elif array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        norm = norms.get(theirs.rsplit("/", 1)[0], {})
        if ours.endswith("bn.weight") and norm and not norm.get("scale_after_normalization", 1):
            array = np.ones_like(array)      # the graph carries a gamma that it does not apply
        state[ours] = np.ascontiguousarray(array)
    return state


def _read_tgz(content, path):
    graphs = [file for name, file in archives.tar_members(path, io.BytesIO(content))
              if name.endswith(".pb")]
    if not graphs:
        raise UserError(f"{path}: the archive holds no .pb: expected classify_image_graph_def.pb")
    return _read_pb(graphs[0].read(), path)


def _read_pth(content, path):
    return {name: lazy.read() for name, lazy in torch_pickle.open_torch(path, content).items()}


# First bytes of a file -> its reader; names are not trusted.
_READERS = {b"PK": _read_pth, b"\x80": _read_pth, b"\x1f\x8b": _read_tgz, b"\x0a": _read_pb}


def read_state(content: bytes, path="the file") -> dict:
    """The 472 tensors of `network.state_shapes()` from the bytes of the file ``path``, as float32.

    Raises UserError: another format, damaged, or other tensors.
    """
    reader = next((r for start, r in _READERS.items() if content.startswith(start)), None)
    if reader is None:
        raise UserError(f"{path}: neither a PyTorch file (.pth) nor a TensorFlow graph (.pb, .tgz)")
    found = reader(content, path)
    shapes = network.state_shapes()
    found = {k: v for k, v in found.items() if not k.endswith("num_batches_tracked")}
    missing, extra = shapes.keys() - found.keys(), found.keys() - shapes.keys()
    if missing or extra:
        example = min(missing or extra)
        raise UserError(f"{path}: not the FID Inception: {len(missing)} tensors missing, "
                        f"{len(extra)} not known (first {example!r}); torchvision's own weights do "
                        "not fit")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise UserError(f"{path}: {name}: shape {found[name].shape}, expected {shape}")
        if not np.all(np.isfinite(found[name])):
            raise UserError(f"{path}: {name}: has a value that is not finite")
    return {name: np.asarray(found[name], np.float32) for name in shapes}


def state_sha256(state: dict) -> str:
    """Identity of the tensors themselves: equal for a .pth and a .pb with the same numbers."""
    digest = hashlib.sha256()
    for name in network.state_shapes():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(state[name], "<f4").tobytes())
    return digest.hexdigest()


def fingerprint_images() -> np.ndarray:
    """Eight seeded images, uint8 [8,32,32,3]."""
    rng = np.random.default_rng(FINGERPRINT_SEED)
    return rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)


def fingerprint(params: dict, *, precision: str = "highest") -> np.ndarray:
    """pool_3 of `fingerprint_images`, float32 [8,2048], computed on this machine."""
    run = jax.jit(lambda p, x: network.features(p, x, precision=precision))
    return np.concatenate([np.asarray(run(params, image[None])) for image in fingerprint_images()])


def fingerprint_error(weights: Weights, *, precision: str = "highest") -> float | None:
    """Relative distance of this machine's pool_3 from the one stored at conversion.

    Near 3e-7 in float32; 5e-4 or more: the device rounds its multiplications.
    """
    if weights.fingerprint is None:
        return None
    ours = fingerprint(weights.params, precision=precision).astype(np.float64)
    stored = weights.fingerprint.astype(np.float64)
    return float(np.linalg.norm(ours - stored) / np.linalg.norm(stored))


def _check_source(digest, size, path, allow_unknown):
    if digest in KNOWN_SOURCES or allow_unknown:
        return
    raise UserError(
        f"{path} ({size} bytes, sha256 {digest}) is not a known source of the weights (known: "
        f"{', '.join(f'{name} {sha}' for sha, name in KNOWN_SOURCES.items())}; TensorFlow's .pb "
        "and .tgz have no published hash); if you trust it, add --allow_unknown_weights")


def convert(source, target, *, allow_unknown: bool = False, overwrite: bool = False) -> dict:
    """.pth, .pb or .tgz -> .npz with the tensors, their origin's sha256 and a feature fingerprint.

    -> {'source_sha256', 'state_sha256', 'bytes'}. UserError: unknown hash, wrong shapes, code
    inside, target there already.
    """
    if not str(target).endswith(".npz"):
        raise UserError(f"{target}: the converted file must end in .npz")
    if files.exists(target) and not overwrite:
        raise UserError(f"{target} exists; name another file or add --overwrite")
    content = files.read_bytes(source)
    digest = hashlib.sha256(content).hexdigest()
    _check_source(digest, len(content), source, allow_unknown)
    state = read_state(content, source)
    identity = state_sha256(state)
    files.write_npz(target, state | {
        "source_sha256": np.array(digest), "state_sha256": np.array(identity),
        "fingerprint": fingerprint(network.fold(state))})
    return {"source_sha256": digest, "state_sha256": identity, "bytes": len(content)}


def candidates(explicit=None, environ=None) -> list:
    """(what it is, path) of every place that is searched, in order."""
    environ = os.environ if environ is None else environ
    if explicit:
        return [("--inception_weights", str(explicit))]
    home = environ.get("HOME", os.path.expanduser("~"))
    cache = environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    hub = (environ.get("TORCH_HOME") or f"{cache}/torch") + "/hub/checkpoints/"
    places = [(f"${ENVIRONMENT}", environ[ENVIRONMENT])] if environ.get(ENVIRONMENT) else []
    return places + [
        ("cache", f"{cache}/ddpm_jax/{CONVERTED_NAME}"),
        ("pytorch-fid's copy", hub + "pt_inception-2015-12-05-6726825d.pth"),
        ("torch-fidelity's copy", hub + "weights-inception-2015-12-05-6726825d.pth"),
        ("TTUR's copy", "/tmp/classify_image_graph_def.pb"),
        ("TTUR's copy", "/tmp/imagenet/classify_image_graph_def.pb"),
        ("TensorFlow's copy", "/tmp/imagenet/inception-2015-12-05.tgz")]


def missing_message(places) -> str:
    looked = "; ".join(f"{what} {path}" for what, path in places)
    return (
        f"Inception's weights are needed for FID, IS, KID and precision/recall and are not here. "
        f"Looked for, in order: {looked}. Download {URLS[0]} or {URLS[1]} ({PTH_BYTES} bytes, "
        f"sha256 {PTH_SHA256}) or {TGZ_URL}, then run: ddpm inception convert FILE "
        f"~/.cache/ddpm_jax/{CONVERTED_NAME}. Without the weights, --metrics=bpd,offline works.")


def find(explicit=None, environ=None) -> str:
    """Path of the weights, or UserError with everything needed to get them."""
    places = candidates(explicit, environ)
    for _, path in places:
        if files.exists(path):
            return path
    raise UserError(missing_message(places))


def load(path, *, allow_unknown: bool = False) -> Weights:
    """Weights from a converted .npz (checked when converted), or straight from a source file."""
    if not str(path).endswith(".npz"):
        content = files.read_bytes(path)
        digest = hashlib.sha256(content).hexdigest()
        _check_source(digest, len(content), path, allow_unknown)
        state = read_state(content, path)
        return Weights(network.fold(state), state_sha256(state), digest, str(path), None)
    arrays = files.read_npz(path)
    shapes = network.state_shapes()
    wrong = [n for n, s in shapes.items() if n not in arrays or arrays[n].shape != s]
    if wrong or "state_sha256" not in arrays:
        raise UserError(f"{path} was not written by `ddpm inception convert`: "
                        f"{len(wrong)} tensors missing or of another shape")
    identity = state_sha256(arrays)
    if identity != str(arrays["state_sha256"]):
        raise UserError(f"{path}: the tensors do not have the stored sha256: damaged file, convert "
                        "again")
    return Weights(network.fold(arrays), identity, str(arrays["source_sha256"]), str(path),
                   arrays["fingerprint"])
