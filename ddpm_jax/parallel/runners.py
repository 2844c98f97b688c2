"""Three ways to run one per-device function on all devices: jit, pmap, jit + shard_map.

A runner is data and functions; nothing else in the program branches on devices. Every argument and
result has a placement: ``replicated`` (the same on all devices), ``batch`` (axis 0 is sharded over
the devices), ``steps`` (axis 1 is: a batch for each step of a dispatch), and under jit also a tree
of shardings (parallel/cut.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"
CUT_AXIS = "shards"  # of the jit runner's mesh: the devices over which a state is cut
_LOOPS_ON_HOST = {"cpu"}
SPECS = {"replicated": P(), "batch": P(AXIS), "steps": P(None, AXIS)}


class Runner(NamedTuple):
    """mesh: one axis over all devices of all processes, a process's devices side by side; CUT_AXIS
    is a second one, of neighbours.
    axis_name: the axis that collectives name; None under jit, where the function sees whole arrays.
    num_virtual_devices: devices over which such an array is sharded (1 elsewhere).
    compile(fn, args, results, donate=()): fn on all devices; args, results: placements.
    put(placement, tree): this process's part as numpy -> device arrays. abstract(placement, tree of
    ShapeDtypeStruct, whole) -> arguments of .lower(). to_global(tree): replicated results as global
    arrays, for checkpoints. local(x): this process's part of a 'batch' result, numpy.
    constrain(x): inside a program, constrains axis 0 of x to be sharded over the devices.
    loops_on_device: whether a loop is compiled into one program (see parallel/loops.py)."""

    name: str
    mesh: Mesh
    axis_name: str | None
    num_virtual_devices: int
    compile: Callable
    put: Callable
    abstract: Callable
    to_global: Callable
    local: Callable
    loops_on_device: bool
    constrain: Callable = lambda x: x

    @property
    def num_devices(self) -> int:
        return self.mesh.size


def fetch(tree):
    """Replicated results of any runner as numpy."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


def one_copy_a_host(x):
    """A replicated array on one device of each process, without a copy; anything else as it is.

    For Orbax: from an array on all devices it writes a slice of each, and compiles a program for
    each shape and device.
    """
    if (not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1
            or not x.sharding.is_fully_replicated):
        return x
    first = {d.process_index: d for d in sorted(x.sharding.device_set, key=lambda d: -d.id)}
    here = [s.data for s in x.addressable_shards if s.device in first.values()]
    return jax.make_array_from_single_device_arrays(
        x.shape, NamedSharding(_mesh(first.values()), P()), here)


def _mesh(devices, shards=1) -> Mesh:
    devices = np.array(sorted(devices, key=lambda d: (d.process_index, d.id)))
    if shards == 1:
        return Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,))
    return Mesh(devices.reshape(-1, shards), (AXIS, CUT_AXIS), axis_types=(AxisType.Auto,) * 2)


def _loops_on_device(mesh) -> bool:
    return mesh.devices.flat[0].platform not in _LOOPS_ON_HOST


def _global_arrays(mesh):
    """put, abstract, local for runners whose arrays are global."""

    def put(placement, tree):
        if not isinstance(placement, str):  # every process has all of it
            return jax.tree.map(lambda s, x: _put(s, x, _put_whole), placement, tree)
        sharding = _sharding(mesh, placement)
        return jax.tree.map(
            lambda x: _put(sharding, x, jax.make_array_from_process_local_data), tree)

    def abstract(placement, tree):
        if isinstance(placement, str):
            sharding = _sharding(mesh, placement)
            placement = jax.tree.map(lambda _: sharding, tree)
        return jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            tree, placement)

    def local(x):
        shards = sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0)
        return np.concatenate([np.asarray(s.data) for s in shards])

    return put, abstract, local


def _put(sharding, x, from_host):
    if isinstance(x, jax.Array) and sharding.is_fully_addressable:
        return jax.device_put(x, sharding, may_alias=False)  # either may be donated
    return from_host(sharding, np.asarray(x))


def _put_whole(sharding, x):
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _sharding(mesh, placement):
    if not isinstance(placement, str):
        return placement
    devices = AXIS if len(mesh.axis_names) == 1 else mesh.axis_names
    return NamedSharding(mesh, P(*(devices if name == AXIS else name for name in SPECS[placement])))


def _shardings(mesh, placements):
    return tuple(_sharding(mesh, k) for k in placements)


def _single(placements, values):
    return values if len(placements) > 1 else values[0]


def jit_runner(devices, shards=1) -> Runner:
    """Global view: XLA's partitioner divides the program. shards: a divisor of the number of
    devices, the length of CUT_AXIS."""
    mesh = _mesh(devices, shards)
    put, abstract, local = _global_arrays(mesh)

    def compile(fn, args, results, donate=()):
        return jax.jit(
            fn,
            in_shardings=_shardings(mesh, args),
            out_shardings=_single(results, _shardings(mesh, results)),
            donate_argnums=donate,
        )

    def constrain(x):
        return jax.lax.with_sharding_constraint(x, _sharding(mesh, "batch"))

    return Runner("jit", mesh, None, mesh.size, compile, put, abstract, lambda tree: tree, local,
                  _loops_on_device(mesh), constrain)


def shard_map_runner(devices) -> Runner:
    """Per-device view inside jit."""
    mesh = _mesh(devices)
    put, abstract, local = _global_arrays(mesh)

    def compile(fn, args, results, donate=()):
        # check_vma=True would sum the gradients before the step's own mean over devices.
        mapped = jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=tuple(SPECS[k] for k in args),
            out_specs=_single(results, tuple(SPECS[k] for k in results)),
            check_vma=False,
        )
        return jax.jit(
            mapped,
            in_shardings=_shardings(mesh, args),
            out_shardings=_single(results, _shardings(mesh, results)),
            donate_argnums=donate,
        )

    return Runner("shard_map", mesh, AXIS, 1, compile, put, abstract, lambda tree: tree, local,
                  _loops_on_device(mesh))


def pmap_runner(devices) -> Runner:
    """Per-device view, arrays with a leading axis of this process's devices."""
    mesh = _mesh(devices)
    ours = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    count = len(ours) or mesh.size  # no local device: compiling for absent ones
    axes = {"replicated": None, "batch": 0, "steps": 0}

    def cut(placement, x):
        axis = list(SPECS[placement]).index(AXIS)
        shape = (*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1:])
        return np.moveaxis(np.asarray(x).reshape(shape), axis, 0)

    whole = NamedSharding(_mesh(ours), P()) if ours else None

    def put(placement, tree):
        if axes[placement] is None:
            return jax.device_put(tree, whole)
        return jax.tree.map(lambda x: cut(placement, x), tree)

    def abstract(placement, tree):
        def one(s):
            if axes[placement] is None:
                return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole)
            axis = list(SPECS[placement]).index(AXIS)
            shape = list(s.shape)
            shape[axis] //= mesh.size
            return jax.ShapeDtypeStruct((count, *shape), s.dtype)

        return jax.tree.map(one, tree)

    def compile(fn, args, results, donate=()):
        # pmap requires at least one sharded argument: the first is unused.
        mapped = jax.pmap(
            lambda _, *rest: fn(*rest),
            axis_name=AXIS,
            in_axes=(0, *(axes[k] for k in args)),
            out_axes=_single(results, tuple(axes[k] for k in results)),
            donate_argnums=tuple(i + 1 for i in donate),
            devices=list(mesh.devices.flat),
        )
        unused = np.zeros(count, np.int32)

        def run(*rest):
            return mapped(unused, *rest)

        run.lower = lambda *rest: mapped.lower(unused, *rest)
        run.trace = lambda *rest: mapped.trace(unused, *rest)
        return run

    def to_global(tree):
        if jax.process_count() == 1:
            return tree
        return multihost_utils.host_local_array_to_global_array(tree, mesh, P())

    def local(x):
        x = np.asarray(x)
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return Runner("pmap", mesh, AXIS, 1, compile, put, abstract, to_global, local,
                  _loops_on_device(mesh))


RUNNERS: dict[str, Callable[[Any], Runner]] = {
    "jit": jit_runner,
    "pmap": pmap_runner,
    "shard_map": shard_map_runner,
}
# Those whose mesh can have CUT_AXIS: (devices, shards) -> Runner.
CUTTING_RUNNERS: dict[str, Callable[[Any, int], Runner]] = {"jit": jit_runner}
