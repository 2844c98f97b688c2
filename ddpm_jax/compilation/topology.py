"""Names of machines, as people write them, to device descriptions that XLA can compile for.

No accelerator is needed: `libtpu` (TPU) and the CUDA plugin (GPU) hold the compilers and
describe a topology instead of devices. `cpu:8` means eight devices of this process's CPU.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from ddpm_jax.compilation import hardware
from ddpm_jax.errors import UserError

# Read when the plugins load: no metadata server to wait for, no log files, and room for a second
# process that compiles too.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_SKIP_MDS_QUERY": "1", **hardware.NO_TPU,
         "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3"}
GPUS_PER_HOST = 8
NAME = re.compile(
    r"([a-z0-9]+?)(?:(-|:)([1-9][0-9]*(?:x[1-9][0-9]*)*))?(?:\*([1-9][0-9]*))?")


class Topology(NamedTuple):
    """A described machine. chip: the row of `hardware.CHIPS`, None for a CPU; slices: parts of the
    machine (TPU slices, GPU hosts) between which only the data-centre network runs."""

    name: str
    devices: Sequence
    chip: hardware.Chip | None
    slices: int

    @property
    def chips(self) -> int:
        return len(self.devices) // (self.chip.devices_per_chip if self.chip else 1)

    def lowering(self):
        """A context in which kernels can be lowered for GPUs that this process does not have: from
        JAX 0.12 on their compiler has to know the device."""
        if self.chip is None or self.chip.target is None:
            return contextlib.nullcontext()
        device = AbstractDevice(device_kind=self.devices[0].device_kind, num_cores=None,
                                platform="gpu")
        return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def known() -> str:
    """One line that shows each form a name can take."""
    return ", ".join([*(f"{name}-8" for name in hardware.BY_TPU_NAME), "v5p:4x4x4", "v5e:16x16",
                      "v5e-256*2 (two slices)",
                      *(f"{name}:{GPUS_PER_HOST}" for name in hardware.BY_GPU_TARGET), "cpu:8"])


def _unknown(name: str, why: str = "") -> UserError:
    return UserError(f"topology: {name!r} is unknown{why}; known forms: {known()}")


def _need(module: str, name: str, command: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(f"topology: {name!r} needs {module.split('.')[-1]}, which is not "
                        f"installed; run: {command}")


def _describe_tpu(name: str, tpu: hardware.Tpu, joint: str, size: str, slices: int):
    shape = None
    if joint == "-" and "x" not in size:
        chips, rest = divmod(int(size), tpu.cores)
        shape = None if rest else hardware.torus(chips, tpu.dimensions)
    elif joint == ":" and size.count("x") == tpu.dimensions - 1:
        shape = size
    if shape is None:
        sides = "x".join("N" * tpu.dimensions)
        raise _unknown(name, f" (a {tpu.platform} slice is a power of two of chips, "
                             f"or {tpu.platform}:{sides})")
    _need("libtpu", name, f'pip install "jax[tpu]=={jax.__version__}"')
    options = dict(tpu.options)
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    if shape == "2x4":
        options["chips_per_host_bounds"] = (2, 4, 1)  # one host, as v5litepod-8 and v6e-8 are
    if slices > 1:
        options["num_slices"] = slices
    return (f"{tpu.platform}:{shape}", "tpu"), options


def _describe_gpu(name: str, target: str, size: str, hosts: int):
    if "x" in size:
        raise _unknown(name)
    count = int(size)
    if count > GPUS_PER_HOST:
        more, rest = divmod(count, GPUS_PER_HOST)
        if rest:
            raise _unknown(name, f" (more than one host: a multiple of {GPUS_PER_HOST} GPUs)")
        count, hosts = GPUS_PER_HOST, hosts * more
    version = jax.__version__
    _need("jax_plugins.xla_cuda12", name,
          f"pip install --no-deps jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}")
    options = {"topology": f"1x{hosts}x{count}",
               "target_config": pathlib.Path(__file__).with_name(target).read_text()}
    return (name, "cuda"), options, hosts


def _cpu_devices(name: str, size: str) -> Sequence:
    if "x" in size:
        raise _unknown(name)
    count = int(size)
    if jax.config.jax_num_cpu_devices < count:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # the backend runs already: what it has is looked at below
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"topology: {name!r} asks for {count} CPU devices, this process has "
                        f"{len(devices)}; set XLA_FLAGS="
                        f"--xla_force_host_platform_device_count={count}")
    return devices[:count]


def describe(name: str) -> Topology:
    """The devices that `name` stands for.

    v3-8, v4-8, v5p-8, v7x-8 count cores and v5litepod-8, v5e-8, v6e-8 count chips, as Google does;
    v5e:16x16 and v5p:4x4x4 give the torus; `*2` adds slices; h100:8 are 8 GPUs, h100:16 two hosts.
    Raises UserError for an unknown name (it lists the forms), for an absent compiler (with the pip
    command) and when another process holds libtpu.
    """
    from jax.experimental import topologies

    match = NAME.fullmatch(name.strip().lower())
    if match is None:
        raise _unknown(name)
    kind, joint, size, slices = match[1], match[2] or ":", match[3] or "", int(match[4] or 1)
    if kind == "cpu" and slices == 1:
        return Topology(name, _cpu_devices(name, size or "1"), None, 1)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    if kind in hardware.BY_GPU_TARGET:
        chip = hardware.BY_GPU_TARGET[kind]
        where, options, slices = _describe_gpu(name, chip.target, size or "1", slices)
    elif kind in hardware.BY_TPU_NAME and size:
        chip = hardware.BY_TPU_NAME[kind]
        where, options = _describe_tpu(name, chip.tpu, joint, size, slices)
    else:
        raise _unknown(name)
    try:
        devices = topologies.get_topology_desc(*where, **options).devices
    except Exception as error:  # the plugins raise several types, none of them documented
        text = " ".join(str(error).split())
        if "lockfile" in text:
            raise UserError(f"topology: {name!r}: another process holds libtpu; let it finish, "
                            "or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 for both") from error
        raise _unknown(name, f" to the compiler ({text[:160]})") from error
    return Topology(name, devices, chip, slices)
