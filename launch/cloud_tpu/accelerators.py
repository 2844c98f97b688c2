"""Accelerator names such as v5litepod-16, by the package's own table."""

import importlib.util
from typing import NamedTuple

from cloud_tpu import REPO, LaunchError


def _hardware():
    # By its path: neither the package nor JAX needs to be installed where machines are requested.
    spec = importlib.util.spec_from_file_location(
        "ddpm_hardware", REPO / "ddpm_jax" / "compilation" / "hardware.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hardware = _hardware()
TPUS = {chip.tpu.names[0]: chip.tpu for chip in hardware.CHIPS.values() if chip.tpu}
ONE_HOST = 8         # names up to this number are one host, of larger slices each host has
CHIPS_PER_HOST = 4   # this many chips


class Slice(NamedTuple):
    """One accelerator name, taken apart. tpu: its row of the table."""

    family: str
    tpu: tuple
    chips: int
    hosts: int
    topology: str


def parse_accelerator(name: str) -> Slice:
    """'v5litepod-16' -> Slice. Raises LaunchError that lists what exists."""
    family, _, size = name.rpartition("-")
    if family not in TPUS:
        known = ", ".join(f"{f}-{{{','.join(map(str, row.sizes))}}}" for f, row in TPUS.items())
        raise LaunchError(f"accelerator {name!r} is unknown; known: {known}")
    tpu = TPUS[family]
    if not size.isdigit() or int(size) not in tpu.sizes:
        raise LaunchError(f"accelerator {name!r}: {family} comes in sizes "
                          f"{', '.join(map(str, tpu.sizes))}")
    chips = int(size) // tpu.cores
    hosts = 1 if int(size) <= ONE_HOST else chips // CHIPS_PER_HOST
    return Slice(family, tpu, chips, hosts, hardware.torus(chips, tpu.dimensions))
