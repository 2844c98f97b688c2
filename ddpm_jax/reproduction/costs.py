"""What a target costs: FLOPs counted by hand, hours on the paper's machine and on this one."""

import time

import jax
import numpy as np

from ddpm_jax import experiment
from ddpm_jax.compilation.hardware import chip_of
from ddpm_jax.compilation.roofline import unet_work
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation.metrics import default_num
from ddpm_jax.evaluation.options import ALONG_NUM
from ddpm_jax.evaluation.session import Splits
from ddpm_jax.reproduction.figures import FIGURES
from ddpm_jax.reproduction.paper_results import CELLS, V3_8
from ddpm_jax.reproduction.targets import Request, cell_config, is_imported, wanted_splits

MFU = 0.4       # of a chip's peak, where nothing was measured: estimated
CPU_SHARE = 0.5
SIZES = {"cifar10": {"train": 50_000, "test": 10_000}}     # known without the data
HEADER = ("config", "part", "steps", "FLOPs", "hours, v3-8 (paper's speed)", "hours here")


def machine_rate() -> tuple[float, str]:
    """(FLOP/s, how it is known) of all devices here."""
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    if chip is not None:
        rate = chip.per_device(chip.bf16_flops) * jax.device_count() * MFU
        return rate, f"{jax.device_count()} x {device.device_kind} at {MFU:.0%} of peak, estimated"
    x = jax.device_put(np.ones((1024, 1024), np.float32))
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    started = time.perf_counter()
    for _ in range(5):
        multiply(x).block_until_ready()
    rate = 5 * 2 * 1024 ** 3 / (time.perf_counter() - started)
    return rate * CPU_SHARE, (f"{device.device_kind}, {CPU_SHARE:.0%} of a measured "
                              f"{rate / 1e9:.0f} GFLOP/s, estimated")


def drawn_count(request: Request) -> int:
    """Images that a target draws: its figure's own number, else --num or what its metrics need."""
    target, num = request.target, request.options.num
    if target.figure:
        images = FIGURES[target.figure].images
        return (num or ALONG_NUM) if images is None else images
    return num or default_num(target.metrics)


def bound_count(request: Request, config) -> int | None:
    """Real images whose bits/dim a target needs; None where the data set is not prepared here."""
    data, num = config.data, request.options.bpd_num
    sizes = SIZES.get(data.name)
    if sizes is None:
        try:
            sizes = {split: len(source) for split, source in Splits(
                data.name, data.dir, (data.image_size, data.image_size, data.channels)).items()}
        except UserError:
            return None
    return sum(min(sizes[s], num or sizes[s]) for s in wanted_splits(request.target, sizes))


def costs(request: Request, config, rate) -> list[tuple]:
    """(part, FLOPs, hours on a v3-8 by the paper's speed, hours here), of training first; what is
    unknown is None."""
    one = float(unet_work(experiment.network(config)).forward_flops)
    steps, batch, T = config.train.steps, config.train.batch_size, config.diffusion.num_timesteps
    calls = {"sample": sum(n for chain in request.target.chains for n in chain.fids) or T,
             "bits/dim": T}
    paper = V3_8.get(config.data.image_size)
    rows = [("train", 3 * one * batch * steps,
             paper and steps * batch / paper["batch"] / paper["steps_per_s"] / 3600)]
    chains = {"sample": drawn_count(request)}
    if "bpd" in request.target.metrics:
        chains["bits/dim"] = bound_count(request, config)
    for part, count in chains.items():
        if count is None:
            rows.append((part, None, None))
        elif count:
            rows.append((part, one * calls[part] * count, paper and (
                count / paper["samples"] * paper["sample_s"] * calls[part] / 1000 / 3600)))
    return [(part, flops, hours, flops and flops / rate / 3600) for part, flops, hours in rows]


def cost_rows(request: Request) -> tuple[list, str]:
    """Rows under HEADER for the cells of a target, and how the speed of this machine is known."""
    rate, how = machine_rate()
    rows = []
    for name in request.target.cells:
        config = cell_config(request, name)
        imported = bool(request.root) and is_imported(f"{request.root}/{name}")
        for part, flops, hours, here in costs(request, config, rate)[imported:]:
            label = f"{request.config} + {name}" if request.config else CELLS[name].config
            # The paper timed its own networks.
            known = hours if CELLS[name].of == "cifar10_table2" else None
            rows.append([label, part, config.train.steps if part == "train" else None,
                         flops and f"{flops:.2e}", known, here])
    return rows, how
