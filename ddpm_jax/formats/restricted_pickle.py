"""Unpickles with stand-ins for the few names that a caller lists; any other name is refused.

A pickle may import and call any function, so Python's own loader runs whatever a file holds.
"""

import pickle
import pickletools

from ddpm_jax.errors import UserError

# No file that is read here has these, and damaged ones crash Python's unpickler.
_BUFFERS = {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, names, advice, persistent_load):
        super().__init__(file, encoding="latin1")
        self._names, self._advice = names, advice
        self.persistent_load = persistent_load

    def find_class(self, module, name):
        if (module, name) in self._names:
            return self._names[module, name]
        raise UserError(f"refused: it asks for {module}.{name}, and {self._advice}")


def _no_persistent(saved):
    raise UserError("refused: it refers to objects outside the pickle")


def load(file, names: dict, advice: str, persistent_load=_no_persistent):
    """The value of the pickle at the position of a binary file.

    names: {(module, name): what stands for it}. A pickle may set attributes of these: give new
    functions and classes to each call, or what cannot change. Raises UserError, ending with
    ``advice``, for any other name, and nearly anything for a damaged pickle.
    """
    start = file.tell()
    if any(opcode.name in _BUFFERS for opcode, *_ in pickletools.genops(file)):
        raise UserError("refused: a pickle with buffers")
    file.seek(start)
    return _Unpickler(file, names, advice, persistent_load).load()
