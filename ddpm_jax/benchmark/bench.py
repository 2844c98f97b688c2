"""What the measurements of `ddpm bench` share: options, random images, first call, profile."""

import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import experiment
from ddpm_jax.compilation import cache, profiles, report, timing
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files

COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer"


class Bench(NamedTuple):
    """config, called name; repeats: rounds at most; seconds: no more rounds after this long (but
    three); compare: a row of peers.PEERS; profile: new folder for a trace."""

    config: Any
    name: str
    repeats: int = 20
    seconds: float = 20.0
    compare: str | None = None
    profile: str | None = None

    def start(self) -> experiment.Experiment:
        """The experiment on this machine, with the compilation cache on."""
        print(f"compilation cache: {cache.enable_compilation_cache() or 'off'}")
        if self.profile:
            _without_command_buffers()
        return experiment.build_model(self.config)

    def rounds(self, candidates) -> dict[str, list[float]]:
        """{name: seconds of each round} of {name: call}; see timing.rounds."""
        return timing.rounds(candidates, repeats=self.repeats, seconds=self.seconds)

    def row(self, bench: str, name: str, seconds, **facts: Any) -> dict:
        """timing.result of a measurement on this machine's devices."""
        return timing.result(
            bench, name=name, times=timing.Times.of(seconds), devices=jax.devices(),
            config=self.name, dtype=self.config.model.dtype, runner=self.config.parallel.runner,
            **facts)

    def trace(self, call, text, *, seconds, steps, steps_in_text=1) -> dict:
        """Trace one call into --profile, print where its time goes and hold it against `seconds`,
        those of a step. text() -> the program's optimised HLO; steps: of a call; steps_in_text: of
        a call as that text counts it. -> what a row keeps of it; {} without kernels."""
        folder = report.check_folder(self.profile)
        with jax.profiler.trace(str(folder)):
            call()
        try:
            found = profiles.table(
                folder, text(), platform=jax.devices()[0].platform, steps=steps,
                steps_in_text=steps_in_text)
        except UserError as error:  # the rows are measured all the same
            print(error)
            return {}
        files.write_json(folder / "kernels.json", found, sort_keys=False)
        print(profiles.render(found))
        print("\n".join(profiles.check(found, seconds)))
        print(f"trace: {folder} (TensorBoard or Perfetto); every kernel: kernels.json there")
        kept = ("seconds", "busy_s", "parts", "by_class")
        return {"profile": {key: found[key] for key in kept}}


def _without_command_buffers() -> None:
    """Have XLA launch a GPU's kernels one by one: those of a CUDA graph carry no instruction's name
    in a trace. Before the first use of a device; the rows' XLA_FLAGS show it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if COMMAND_BUFFERS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {COMMAND_BUFFERS}=".strip()


def random_images(exp, count) -> np.ndarray:
    """uint8 [count,H,W,C], the same each time."""
    return np.random.default_rng(0).integers(0, 256, (count, *exp.image_shape), np.uint8)


def random_labels(exp, shape):
    """int32 of ``shape``, the same each time; None for a model without classes."""
    classes = exp.model.num_classes
    return np.random.default_rng(1).integers(0, classes, shape, np.int32) if classes else None


def first_call(call) -> str:
    """Seconds of a program's first call, and what was compiled in it (cache hit or miss)."""
    before = time.perf_counter()
    with cache.count_compilations() as done:
        call()
    longest = f" ({max(done, key=lambda c: c.seconds)})" if done else ""
    return f"{time.perf_counter() - before:.1f} s{longest}"
