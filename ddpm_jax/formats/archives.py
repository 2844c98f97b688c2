"""Tar archives, and the binary batches of CIFAR-10 in one of them."""

import io
import tarfile
import zlib

import numpy as np

from ddpm_jax.errors import UserError

_LARGEST_MEMBER = 1 << 30  # so that a small archive cannot fill the memory


def tar_members(path, file=None):
    """The regular files of a tar archive, in its order: yields (name, binary stream).

    file: the archive as a binary stream, where it is not to be opened at ``path``. Raises UserError
    where it is damaged: headers have a checksum, contents only in a compressed archive, where the
    error comes after the last member.
    """
    try:
        with tarfile.open(None if file else path, fileobj=file) as archive:
            for member in archive:
                if member.isfile() and member.size > _LARGEST_MEMBER:
                    raise UserError(f"{path}: {member.name} unpacks to {member.size:,} bytes: not "
                                    "an archive that is read here")
                if member.isfile():
                    yield member.name, io.BytesIO(archive.extractfile(member).read())
            # A damaged header ends the loop too, as if it were the end of the archive.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end is missing")
            while archive.fileobj.read(1 << 20):  # to the checksum of the compression
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        reason = str(error).partition("\n")[0].rstrip(":")  # of several lines
        raise UserError(f"{path}: missing, damaged or not a tar archive ({reason})") from error


def cifar_batch(data, where):
    """One file of the binary CIFAR-10 -> (uint8 [n, 32, 32, 3], labels uint8 [n])."""
    rows = np.frombuffer(data, np.uint8)
    if not len(rows) or len(rows) % 3073 or rows[::3073].max() > 9:
        raise UserError(f"{where}: not a batch of the binary CIFAR-10 (n x 3073 bytes)")
    rows = rows.reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]
