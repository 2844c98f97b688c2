"""Which arrays of a training state are cut over devices, and along which axis.

Cut are moments and average (ZeRO-1, Rajbhandari et al. 2020, section 5.1), or the weights too
(FSDP). XLA's partitioner inserts the collectives where the constraints below need them.
"""

import collections
import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ddpm_jax.parallel.runners import CUT_AXIS

# Fields of a TrainState that each kind of cut has.
CUTS = {"optimizer": ("ema_params", "opt_state"), "params": ("params", "ema_params", "opt_state")}
WHOLE_BYTES = 4 << 20  # stacks up to here stay whole: their collectives would cost more than memory


class Cut(NamedTuple):
    """mesh: the jit runner's, with CUT_AXIS; fields: of a TrainState; axes: {shape: the axis that
    is cut}, of named kernels and of their stacks; an array of another shape is whole."""

    mesh: Mesh
    fields: tuple[str, ...]
    axes: dict[tuple[int, ...], int]

    def sharding(self, shape) -> NamedSharding:
        axis = self.axes.get(tuple(shape))
        return NamedSharding(self.mesh, P() if axis is None else P(*[None] * axis, CUT_AXIS))

    def shardings(self, state):
        """Those of a TrainState, its weights named or packed."""
        whole = NamedSharding(self.mesh, P())
        return type(state)(**{
            name: jax.tree.map(lambda x, cut=name in self.fields:
                               self.sharding(x.shape) if cut else whole, part)
            for name, part in state._asdict().items()})

    def spread(self, tree):
        """Inside a program: each device keeps its part of the arrays in ``axes``."""
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, self.sharding(x.shape)), tree)

    def gathered(self, params):
        """Inside a program: weights in the network's tree, whole on each device. Of the gradient of
        each, summed over the devices, a device keeps its part as soon as it is made."""
        return jax.tree.map(
            lambda x: _gathered(x, NamedSharding(self.mesh, P()), self.sharding(x.shape)), params)


def held_bytes(state) -> tuple[int, int]:
    """(on one device, in all) of a tree of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(state)
    return tuple(sum(math.prod(shape) * x.dtype.itemsize for x, shape in zip(
        leaves, shapes, strict=True)) for shapes in (
            [x.sharding.shard_shape(x.shape) for x in leaves], [x.shape for x in leaves]))


def shares_links(mesh) -> bool:
    """Whether the devices over which a state is cut lie in one slice (of a TPU), or host or domain
    of links (of GPUs): weights should not pass through the data-centre network."""
    return all(len({getattr(d, "slice_index", 0) for d in row}) == 1 for row in mesh.devices)


def slice_size(mesh) -> int:
    """Devices of the smallest slice, or host of GPUs."""
    return min(collections.Counter(
        getattr(d, "slice_index", 0) for d in mesh.devices.flat).values())


def make_cut(mesh, like, *, fields, order) -> Cut:
    """like: the network's tree of weights; order: that of the axes of 4-D ones in their stacks.

    Output channels are cut (the first axis of 4-D kernels, OHWI, and the last of the others), so
    that a convolution gathers its own kernel and not the whole stack; where the shards do not
    divide them, the longest axis that they divide.
    """
    shards, axes = mesh.shape[CUT_AXIS], {}
    counts = collections.Counter(x.shape for x in jax.tree.leaves(like) if x.ndim > 1)
    for shape, count in counts.items():
        order_here = order if len(shape) == len(order) else tuple(range(len(shape)))
        output = 0 if len(shape) == len(order) else len(shape) - 1
        longest = sorted(range(len(shape)), key=lambda i: -shape[i])
        axis = next((i for i in (output, *longest) if shape[i] % shards == 0), None)
        if axis is not None and 4 * count * math.prod(shape) > WHOLE_BYTES:
            axes[shape] = axis
            axes[count, *(shape[i] for i in order_here)] = 1 + order_here.index(axis)
    return Cut(mesh, fields, axes)


def _gathered(x, whole, part):
    @jax.custom_vjp
    def gather(x):
        return jax.lax.with_sharding_constraint(x, whole)

    def backward(_, g):
        # Whole first: a cut output would let the partitioner gather activations instead.
        g = jax.lax.with_sharding_constraint(g, whole)
        return (jax.lax.with_sharding_constraint(g, part),)

    gather.defvjp(lambda x: (gather(x), None), backward)
    return gather(x)

