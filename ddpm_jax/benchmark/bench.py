"""What the measurements of `ddpm bench` share: options, random images, first call, profile."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax import experiment
from ddpm_jax.compilation import cache, report, timing
from ddpm_jax.storage import files


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

    def trace(self, call, lowered) -> None:
        """Trace one call into --profile and print its kernels. lowered() -> the program lowered."""
        folder = report.check_folder(self.profile)
        with jax.profiler.trace(str(folder)):
            call()
        found = timing.kernel_times(folder, lowered().compile().as_text())
        files.write_json(folder / "kernels.json", found, sort_keys=False)
        for name, seconds in found["by_class"].items():
            print(f"  {seconds * 1e3:10.2f} ms  {name}")
        for row in found["kernels"][:15]:
            print(f"  {row['seconds'] * 1e3:10.2f} ms  {row['count']:6d} x  {row['name']} "
                  f"({row['class']})")
        print(f"trace: {folder} (TensorBoard or Perfetto)")


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
