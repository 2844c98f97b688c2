"""Names of machines, as people write them, to device descriptions that XLA can compile for.

No accelerator is needed: `libtpu` (TPU) and the CUDA plugin (GPU) hold the compilers and are asked
for a topology instead of devices. `cpu:8` means eight devices of this process' CPU.
"""

import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

# Read when the plugins load: no metadata server to wait for, no log files, and room for a second
# process that compiles too.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_SKIP_MDS_QUERY": "1",
         "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
         "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled", "TPU_MIN_LOG_LEVEL": "3"}

import jax  # noqa: E402

from ddpm_jax.compilation import hardware  # noqa: E402
from ddpm_jax.errors import UserError  # noqa: E402


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


class Generation(NamedTuple):
    """How one TPU generation is named. platform_name: libtpu's; cores: what one chip counts for in
    names such as v3-8 (cores) and v6e-8 (chips); dimensions: of its torus; options: for libtpu."""

    platform_name: str
    chip: str
    cores: int
    dimensions: int
    options: dict
    example: str


GENERATIONS = {
    "v2": Generation("v2", "v2", 2, 2, {}, "v2-8"),
    "v3": Generation("v3", "v3", 2, 2, {}, "v3-8"),
    # Two cores that act as one device, as on real v4 machines; libtpu must be told.
    "v4": Generation("v4", "v4", 2, 3, {"chip_config_name": "megacore"}, "v4-8"),
    "v5litepod": Generation("v5e", "v5e", 1, 2, {}, "v5litepod-8"),
    "v5e": Generation("v5e", "v5e", 1, 2, {}, "v5e-256"),
    "v5p": Generation("v5p", "v5p", 2, 3, {}, "v5p:4x4x4"),
    "v6e": Generation("v6e", "v6e", 1, 2, {}, "v6e-8"),
    "v7x": Generation("tpu7x", "v7x", 2, 3, {}, "v7x-8"),
    "tpu7x": Generation("tpu7x", "v7x", 2, 3, {}, "tpu7x:2x2x1"),
}
# Target descriptions that the project ships, and how many GPUs a host has.
GPU_TARGETS = {"h100": "h100.txtpb"}
GPUS_PER_HOST = 8
NAME = re.compile(r"([a-z0-9]+?)(?:(-|:)([0-9x]+))?(?:\*(\d+))?")


def known() -> str:
    """One line that shows each form a name can take."""
    examples = [g.example for g in GENERATIONS.values()]
    return ", ".join([*examples, "v5e:16x16", "v5e-256*2 (two slices)",
                      *(f"{name}:{GPUS_PER_HOST}" for name in GPU_TARGETS), "cpu:8"])


def torus(chips: int, dimensions: int) -> str | None:
    """The usual shape of a slice of `chips` chips, such as '2x4' or '4x4x8'; None if there is none.

    Sides are powers of two, as equal as they can be, the smallest first; 3-D slices of fewer than
    8 chips are flat (2x2x1), as they are sold.
    """
    exponent = chips.bit_length() - 1
    if chips < 1 or chips != 1 << exponent:
        return None
    if dimensions == 3 and chips <= 4:
        return {1: "1x1x1", 2: "1x2x1", 4: "2x2x1"}[chips]
    low, more = divmod(exponent, dimensions)
    return "x".join(str(1 << (low + (i >= dimensions - more))) for i in range(dimensions))


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


def _describe_tpu(name: str, generation: Generation, joint: str, size: str, slices: int):
    if joint == "-":
        chips, rest = divmod(int(size), generation.cores)
        shape = None if rest or "x" in size else torus(chips, generation.dimensions)
    else:
        shape = size if size.count("x") == generation.dimensions - 1 else None
    if shape is None:
        sides = "x".join("NNN"[:generation.dimensions])
        raise _unknown(name, f" (a {generation.platform_name} slice is a power of two of chips, "
                             f"or {generation.platform_name}:{sides})")
    _need("libtpu", name, f'pip install "jax[tpu]=={jax.__version__}"')
    options = dict(generation.options)
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    if shape == "2x4":
        options["chips_per_host_bounds"] = (2, 4, 1)  # one host, as v5litepod-8 and v6e-8 are
    if slices > 1:
        options["num_slices"] = slices
    return (f"{generation.platform_name}:{shape}", "tpu"), options


def _describe_gpu(name: str, gpu: str, size: str, hosts: int):
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
    target = pathlib.Path(__file__).with_name(GPU_TARGETS[gpu]).read_text()
    options = {"topology": f"1x{hosts}x{count}", "target_config": target}
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
    if kind == "cpu":
        return Topology(name, _cpu_devices(name, size or "1"), None, 1)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    if kind in GPU_TARGETS:
        chip = hardware.CHIPS[kind]
        where, options, slices = _describe_gpu(name, kind, size or "1", slices)
    elif kind in GENERATIONS and size:
        chip = hardware.CHIPS[GENERATIONS[kind].chip]
        where, options = _describe_tpu(name, GENERATIONS[kind], joint, size, slices)
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
