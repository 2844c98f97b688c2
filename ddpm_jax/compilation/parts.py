"""Which part of a U-Net's training or denoising step a kernel belongs to, by its `op_name`.

JAX writes the path of modules and transformations that made an operation into its metadata, such as
'jit(f)/transpose(jvp(UNet))/up_0_block_1/norm2/reduce_sum'; XLA hands that of a fusion's root on.
"""

import math
import re
from typing import NamedTuple

from ddpm_jax.compilation import hlo

WINDOW = re.compile(r"window=\{size=([\dx]+)")


class Origin(NamedTuple):
    """What a part is recognised by. kind: a row of hlo.CLASSES; path: `op_name` cut at its slashes;
    backward: whether it is of a gradient; filter: of a convolution, whether it makes the gradient
    of the weights; map: whether it writes an array as large as any that it reads, with at least
    four dimensions."""

    kind: str
    path: list[str]
    backward: bool
    filter: bool
    map: bool

    def within(self, *names: str) -> bool:
        """Whether a module's name starts with, or has after an underscore, one of ``names``."""
        return any(segment.startswith(names) or any(f"_{n}" in segment for n in names)
                   for segment in self.path)

    @property
    def network(self) -> bool:
        return any("UNet" in segment for segment in self.path)


def _convolution(k):
    return k.kind == "convolution"


def _norm(k):
    return k.within("norm")


def _kernel(k):
    return k.path[-1] == "pallas_call"  # of models/*_kernels.py


def _norm_kernel(k):
    return _norm(k) and _kernel(k)


# First match names the part, in this order; the norms of attention blocks count as norm.
PARTS = {
    "collectives": lambda k: k.kind == "collective",
    "convolution, forward": lambda k: _convolution(k) and not k.backward,
    "convolution, filter gradient": lambda k: (_convolution(k) and k.filter
                                               or _kernel(k) and not k.within("norm", "attn")),
    "convolution, input gradient": _convolution,
    "random bits": lambda k: k.kind == "random bits",
    "optimizer, clip, average, data, sampler": lambda k: not k.network and k.path != [""],
    "norm kernels, forward": lambda k: _norm_kernel(k) and not k.backward,
    "norm kernels, backward": _norm_kernel,
    "norm sums, forward": lambda k: _norm(k) and not k.backward and not k.map,
    "norm apply, forward": lambda k: _norm(k) and not k.backward,
    "norm sums, backward": lambda k: _norm(k) and not k.map,
    "norm apply, backward": _norm,
    "attention, forward": lambda k: k.within("attn") and not k.backward,
    "attention, backward": lambda k: k.within("attn"),
    "1x1 shortcuts": lambda k: k.within("shortcut"),
    "skip concatenations": lambda k: k.kind == "concatenation",
    "bias gradients": lambda k: k.backward and k.within("conv") and k.kind.startswith("reduction"),
    "rest": lambda k: True,
}


def _elements(type: str) -> list[int]:
    return [math.prod(shape) for shape in hlo.shapes(type)]


def _filter_gradient(i: hlo.Instruction, body: list[hlo.Instruction]) -> bool:
    """Whether a convolution sums over the batch: its first operand's labels do not begin with b.
    A CPU's compiler relabels it, and may drop its name: its window is then larger than its result
    (on maps of 2x2 so is that of an input gradient)."""
    if "Filter" in (i.attribute("custom_call_target") or ""):
        return True
    x = next((x for x in (i, *body) if x.opcode == "convolution"), None)
    if x is None:
        return False
    labels, window = x.attribute("dim_labels") or "b", WINDOW.search(x.rest)
    out = labels.rpartition(">")[2]
    spatial = [d for d, label in zip(hlo.shapes(x.type)[0], out, strict=False) if label.isdigit()]
    if not labels.startswith("b"):
        return True
    name = hlo.op_name(x)
    return (not name or "transpose(" in name) and window is not None and math.prod(
        map(int, window[1].split("x"))) > math.prod(spatial)


def origins(text: str) -> dict[str, tuple[hlo.Kernel, Origin, str]]:
    """{instruction: (kernel, origin, op_name)} of everything that a call of a program launches."""
    program = hlo.parse(text)
    run = hlo.execution(program)
    found = {}
    for (i, _), kernel in zip(run.lines, hlo.kernels(program, run), strict=True):
        body = program.computations.get(i.attribute("calls"), []) if i.opcode == "fusion" else []
        name, of_filter = hlo.op_name(i), _filter_gradient(i, body)
        read = [n for o in i.operands for n in _elements(run.types.get(o, ""))]
        large = any(len(shape) >= 4 and math.prod(shape) >= max(read, default=0)
                    for shape in hlo.shapes(i.type))
        found[i.name] = kernel, Origin(
            kernel.kind, name.split("/"), "transpose(" in name or of_filter and not name,
            of_filter, large), name
    return found


def part(origin: Origin) -> str:
    """The row of PARTS that an origin belongs to."""
    return next(name for name, test in PARTS.items() if test(origin))
