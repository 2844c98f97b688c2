"""A batch of the input pipeline as training reads it, without the device."""

from ddpm_jax.benchmark.bench import Bench
from ddpm_jax.compilation import timing
from ddpm_jax.data import feed
from ddpm_jax.data.datasets import open_source


def data(bench: Bench) -> list[dict]:
    """Rows of a batch: streamed, and where the data set is small by numpy from memory."""
    config = bench.config
    batch = config.train.batch_size
    source = open_source(config.data.name, config.data.dir, "train",
                         image_size=config.data.image_size, channels=config.data.channels)
    stream = feed.stream(source, seed=config.seed, start_step=0, batch_size=batch,
                         slots=range(batch), threads=config.data.threads)
    candidates = {"streamed": lambda: next(stream)}
    next(stream)
    if feed.is_small(source):
        array, position = source.array(), iter(range(1 << 30))
        candidates["resident, by numpy"] = lambda: array[
            feed.batch_indices(config.seed, next(position), batch, len(source))]
    times = bench._replace(repeats=bench.repeats * 10).rounds(candidates)
    return [timing.result("data", name=name, times=timing.Times.of(t), images=batch,
                          config=bench.name, threads=config.data.threads)
            for name, t in times.items()]
