"""Reads TensorFlow's checkpoint bundles (PREFIX.index, PREFIX.data-0000i-of-0000n) without it.

The index is a LevelDB table: blocks of prefix-compressed keys, a block of block addresses, a footer
(tensorflow/core/lib/io/{block,format,table}.cc). Key "" holds a BundleHeaderProto, every other key
is a variable's name and holds a BundleEntryProto: type, shape, file, offset, size, checksum
(tensorflow/core/protobuf/tensor_bundle.proto). Arrays lie raw in the data files.
"""

import os
import pathlib
import struct

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.formats.lazy import Lazy
from ddpm_jax.formats.protobuf import ProtobufError, content, fields, signed, varint
from ddpm_jax.formats.tfrecord import masked_crc32c

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48  # two block handles padded to 40 bytes, magic
_TRAILER = 5  # compression type, masked checksum
# tensorflow/core/framework/types.proto
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 6: "i1", 9: "<i8", 10: "?", 19: "<f2"}


def _shape(message):
    """Of a TensorShapeProto: dim (2) with its size (1)."""
    return tuple(signed(dict(fields(dim)).get(1, 0))
                 for number, dim in fields(message) if number == 2)


def _handle(data, at):
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return offset, size, at


def _block(index, offset, size, path):
    """{key: value} of one table block, its checksum verified."""
    end = offset + size
    if end + _TRAILER > len(index):
        raise UserError(f"{path}: truncated: a block ends at byte {end}, the file at {len(index)}")
    kind = index[end]
    if masked_crc32c(index[offset : end + 1]) != struct.unpack_from("<I", index, end + 1)[0]:
        raise UserError(f"{path}: damaged: the block at byte {offset} fails its checksum")
    if kind != 0:
        raise UserError(
            f"{path}: block compressed (type {kind}), as in old V1 checkpoints; "
            "re-save the checkpoint with tf.train.Saver's default (V2) format"
        )
    block = index[offset:end]
    entries_end = len(block) - 4 - 4 * struct.unpack_from("<I", block, len(block) - 4)[0]
    pairs, key, at = {}, b"", 0
    while at < entries_end:
        shared, at = varint(block, at)
        fresh, at = varint(block, at)
        length, at = varint(block, at)
        key = key[:shared] + block[at : at + fresh]
        at += fresh
        pairs[key] = block[at : at + length]
        at += length
    return pairs


def _table(index, path):
    if len(index) < _FOOTER or struct.unpack_from("<Q", index, len(index) - 8)[0] != _MAGIC:
        raise UserError(
            f"{path}: not the index of a TensorFlow checkpoint, or cut short "
            "(the table's magic number is not at its end)"
        )
    footer = index[-_FOOTER:]
    try:
        _, _, at = _handle(footer, 0)
        offset, size, _ = _handle(footer, at)
        pairs = {}
        for handle in _block(index, offset, size, path).values():
            start, length, _ = _handle(handle, 0)
            pairs.update(_block(index, start, length, path))
    except (ProtobufError, struct.error) as error:
        raise UserError(f"{path}: damaged: an entry of the table runs past its block") from error
    return pairs


def _reader(path, offset, size, dtype, shape, checksum, name):
    def read():
        try:
            raw = np.fromfile(path, np.uint8, size, offset=offset)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        if len(raw) != size or masked_crc32c(raw) != checksum:
            raise UserError(f"{path}: damaged: variable {name} fails its checksum")
        return raw.view(dtype).reshape(shape)

    return read


def _entry(name, message, files, sizes):
    entry = dict(fields(message))
    if 7 in entry:
        raise UserError(f"variable {name} is partitioned into slices, which is not supported: "
                        "re-save the checkpoint without a partitioner")
    shape = _shape(entry.get(2, b""))
    kind, shard, offset, size = (signed(entry.get(i, 0)) for i in (1, 3, 4, 5))
    if not 0 <= shard < len(files):
        raise UserError(f"variable {name} lies in data file {shard} of {len(files)}")
    if offset < 0 or size < 0 or offset + size > sizes[shard]:
        raise UserError(f"{files[shard]}: truncated: variable {name} ends at byte {offset + size}, "
                        f"the file at {sizes[shard]}")
    dtype = np.dtype(_DTYPES.get(kind, "V1"))
    if kind in _DTYPES and int(np.prod(shape, dtype=np.int64)) * dtype.itemsize != size:
        raise UserError(f"variable {name}: shape {shape} of {dtype} is not {size} bytes")
    if kind not in _DTYPES:
        # Strings and the like (an object graph, say) are in many checkpoints; nothing here needs
        # them, so they are listed and refuse to be read.
        def refuse():
            raise UserError(f"variable {name} has TensorFlow type {kind}, which is not a number")

        return Lazy(shape, dtype, refuse)
    return Lazy(shape, dtype, _reader(files[shard], offset, size, dtype, shape,
                                      int.from_bytes(content(entry.get(6, b"")), "little"), name))


def find_prefix(path) -> str:
    """The checkpoint's prefix from what a user may name: the prefix, its .index file or its folder.

    A folder is looked up as TensorFlow does, in its text file ``checkpoint``.
    Raises UserError where there is no V2 checkpoint.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        state = path / "checkpoint"
        lines = state.read_text(errors="replace").splitlines() if state.is_file() else []
        latest = [line.split('"')[1] for line in lines
                  if line.startswith("model_checkpoint_path:") and line.count('"') >= 2]
        if not latest:
            found = sorted(p.name.removesuffix(".index") for p in path.glob("*.index"))
            raise UserError(f"--checkpoint={path}: a folder without a TensorFlow 'checkpoint' file;"
                            f" name one of its prefixes ({', '.join(found) or 'none there'})")
        # A checkpoint that was copied elsewhere still names the folder it was written in.
        named = path / latest[0]
        path = named if named.with_name(named.name + ".index").exists() else path / named.name
    name = str(path)
    for suffix in (".index", ".meta"):
        name = name.removesuffix(suffix)
    if ".data-" in os.path.basename(name):
        name = name[: name.rindex(".data-")]
    if os.path.isfile(name + ".index"):
        return name
    if os.path.isfile(name):
        raise UserError(f"--checkpoint={name}: one file, not PREFIX.index with PREFIX.data-*: a V1 "
                        "checkpoint (before TensorFlow 0.12) or something else; re-save it with "
                        "tf.train.Saver's default (V2) format")
    raise UserError(f"--checkpoint={path}: no file {name}.index; give the prefix, for example "
                    "FOLDER/model.ckpt-790000")


def open_bundle(prefix) -> dict[str, Lazy]:
    """{variable's name: Lazy array} of the checkpoint PREFIX.index with its PREFIX.data-* files.

    The index is verified here, each array's checksum when it is read. Raises UserError, naming
    the file, for a missing, truncated, damaged or foreign file.
    """
    prefix = os.fspath(prefix)
    path = prefix + ".index"
    try:
        index = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    pairs = _table(index, path)
    header = pairs.pop(b"", None)
    try:
        facts = dict(fields(header)) if header is not None else {1: b""}
        if not isinstance(facts.get(1, 0), int):  # V1 keeps a message of its own there
            raise UserError(f"{path}: a table without a bundle header: not a V2 checkpoint of "
                            "TensorFlow (a V1 checkpoint, or another program's table)")
        shards = signed(facts.get(1, 0))
        if signed(facts.get(2, 0)) != 0:
            raise UserError(f"{path}: written on a big-endian machine, which is not supported")
        files = [f"{prefix}.data-{i:05d}-of-{shards:05d}" for i in range(shards)]
        missing = [f for f in files if not os.path.isfile(f)]
        if missing:
            raise UserError(f"{path} needs {', '.join(missing)}, not found: "
                            "the checkpoint is incomplete")
        sizes = [os.path.getsize(f) for f in files]
        return {name.decode("utf-8", "replace"): _entry(name.decode("utf-8", "replace"), message,
                                                        files, sizes)
                for name, message in pairs.items()}
    except (ProtobufError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged: an entry cannot be decoded") from error
