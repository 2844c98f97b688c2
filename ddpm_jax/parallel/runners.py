"""Three ways to run one per-device function on all devices: jit, pmap, jit + shard_map.

A runner is data and functions; nothing else in the program branches on devices. Arguments and
results are of a kind: ``replicated`` (the same everywhere), ``batch`` (axis 0 is cut over the
devices), ``steps`` (axis 1 is: a batch for each step of a dispatch).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"
_LOOPS_ON_HOST = {"cpu"}
SPECS = {"replicated": P(), "batch": P(AXIS), "steps": P(None, AXIS)}


class Runner(NamedTuple):
    """mesh: one axis over all devices of all processes, a process's devices side by side.
    axis_name: what collectives inside the per-device function name; None under jit, where the
    function sees whole arrays. spread: devices behind such an array (1 elsewhere).
    compile(fn, args, results, donate=()): fn on all devices; args, results: kinds.
    put(kind, tree): this process's numpy share -> device arrays. abstract(kind, tree of
    ShapeDtypeStruct, whole) -> what .lower() takes. to_global(tree): replicated results as global
    arrays, for checkpoints. local(x): a 'batch' result's share of this process, numpy. split(x):
    inside a program, says that axis 0 of x is a batch, of which each device takes its share."""

    name: str
    mesh: Mesh
    axis_name: str | None
    spread: int
    compile: Callable
    put: Callable
    abstract: Callable
    to_global: Callable
    local: Callable
    split: Callable = lambda x: x

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def loops_on_device(self) -> bool:
        """Whether a loop is best compiled into one program. Not on a CPU: XLA runs convolutions in
        a loop's body there without its fast kernels, 4 to 100 times slower (jax issue 12868)."""
        return self.mesh.devices.flat[0].platform not in _LOOPS_ON_HOST


def fetch(tree):
    """Replicated results as numpy, whichever runner made them."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), tree)


def _mesh(devices) -> Mesh:
    devices = sorted(devices, key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _global_arrays(mesh):
    """put, abstract, local for runners whose arrays are global."""

    def put(kind, tree):
        sharding = NamedSharding(mesh, SPECS[kind])
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
        )

    def abstract(kind, tree):
        sharding = NamedSharding(mesh, SPECS[kind])
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
        )

    def local(x):
        shards = sorted(x.addressable_shards, key=lambda s: s.index[0].start or 0)
        return np.concatenate([np.asarray(s.data) for s in shards])

    return put, abstract, local


def _shardings(mesh, kinds):
    return tuple(NamedSharding(mesh, SPECS[k]) for k in kinds)


def _single(kinds, values):
    return values if len(kinds) > 1 else values[0]


def jit_runner(devices) -> Runner:
    """Global view: XLA's partitioner cuts the program."""
    mesh = _mesh(devices)
    put, abstract, local = _global_arrays(mesh)

    def compile(fn, args, results, donate=()):
        return jax.jit(
            fn,
            in_shardings=_shardings(mesh, args),
            out_shardings=_single(results, _shardings(mesh, results)),
            donate_argnums=donate,
        )

    def split(x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, SPECS["batch"]))

    return Runner("jit", mesh, None, mesh.size, compile, put, abstract, lambda tree: tree, local,
                  split)


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

    return Runner("shard_map", mesh, AXIS, 1, compile, put, abstract, lambda tree: tree, local)


def pmap_runner(devices) -> Runner:
    """Per-device view, arrays with a leading axis of this process's devices."""
    mesh = _mesh(devices)
    ours = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    count = len(ours) or mesh.size  # none of ours: compiling for absent devices
    axes = {"replicated": None, "batch": 0, "steps": 0}

    def cut(kind, x):
        if kind not in ("batch", "steps"):
            return x
        axis = list(SPECS[kind]).index(AXIS)
        shape = (*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1:])
        return np.moveaxis(np.asarray(x).reshape(shape), axis, 0)

    def put(kind, tree):
        if axes[kind] is None:
            local_mesh = Mesh(np.array(ours), (AXIS,), axis_types=(AxisType.Auto,))
            return jax.device_put(tree, NamedSharding(local_mesh, P()))
        return jax.tree.map(lambda x: cut(kind, x), tree)

    def abstract(kind, tree):
        def one(s):
            if axes[kind] is None:
                return jax.ShapeDtypeStruct(s.shape, s.dtype)
            axis = list(SPECS[kind]).index(AXIS)
            shape = list(s.shape)
            shape[axis] //= mesh.size
            return jax.ShapeDtypeStruct((count, *shape), s.dtype)

        return jax.tree.map(one, tree)

    def compile(fn, args, results, donate=()):
        # pmap wants at least one argument that is cut: give it one that nobody reads.
        mapped = jax.pmap(
            lambda _, *rest: fn(*rest),
            axis_name=AXIS,
            in_axes=(0, *(axes[k] for k in args)),
            out_axes=_single(results, tuple(axes[k] for k in results)),
            donate_argnums=tuple(i + 1 for i in donate),
            devices=list(mesh.devices.flat),
        )
        unread = np.zeros(count, np.int32)

        def run(*rest):
            return mapped(unread, *rest)

        run.lower = lambda *rest: mapped.lower(unread, *rest)
        run.trace = lambda *rest: mapped.trace(unread, *rest)
        return run

    def to_global(tree):
        if jax.process_count() == 1:
            return tree
        return multihost_utils.host_local_array_to_global_array(tree, mesh, P())

    def local(x):
        x = np.asarray(x)
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    return Runner("pmap", mesh, AXIS, 1, compile, put, abstract, to_global, local)


RUNNERS: dict[str, Callable[[Any], Runner]] = {
    "jit": jit_runner,
    "pmap": pmap_runner,
    "shard_map": shard_map_runner,
}
