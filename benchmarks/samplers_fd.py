"""FD-cnn of a run's samples by sampler and number of network calls: the table of docs/samplers.md.

    python benchmarks/samplers_fd.py runs/digits [CALLS ...]

Frechet distance in the features of the data set's small classifier (`ddpm evaluate
--metrics=offline`) between as many samples as there are test images and the training images, and
the share of samples to whose class the classifier gives more than 0.9. Each sampler has its own
nodes and defaults; the samples are those of `ddpm sample --sampler --steps`.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import experiment, programs
from ddpm_jax.compilation.cache import enable_compilation_cache
from ddpm_jax.data.datasets import open_source
from ddpm_jax.diffusion.sampling import SAMPLERS, reverse_step
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import classifier, scores, small_cnn
from ddpm_jax.sample import load_run
from ddpm_jax.training import rng
from ddpm_jax.training.steps import to_uint8

CALLS, SEED = (5, 10, 15, 20, 50, 100), 0


class _Given:
    """A model whose parameters are its output: the network is compiled once, apart from chains."""

    num_classes = 0

    @staticmethod
    def apply(variables, x_t, t):
        return variables["params"]


def sampling(exp, params, num):
    """-> draw(sampler, steps) -> (uint8 [num,H,W,C], network calls made)."""
    network = jax.jit(lambda x_t, t: experiment.denoise_fn(exp, params)(x_t, t))
    key, index = rng.run_key(np.uint32(SEED)), jnp.arange(num)

    def draw(name, steps):
        chain = programs.sampling_chain(exp._replace(model=_Given), name=name, steps=steps)

        @jax.jit
        def step(output, x_t, t, memory):
            return reverse_step(
                chain.sampler, chain.schedule, chain.predict(output),
                lambda t: chain.noise(key, index, t, exp.image_shape), x_t, t, memory)[:2]

        x_t = chain.start(key, index, exp.image_shape)
        memory = chain.sampler.start(x_t)
        for t in reversed(range(chain.num_steps)):
            timestep = jnp.full(num, chain.schedule.timesteps[t])
            x_t, memory = step(network(x_t, timestep), x_t, t, memory)
        return np.asarray(to_uint8(x_t)), chain.num_steps

    return draw


def judged(found, real):
    """The cell of small_cnn.Outputs: distance to the features ``real``, share of the sure ones."""
    sure = (scores.softmax(found.logits).max(1) > small_cnn.CONFIDENT).mean()
    return f"{small_cnn.distance(found.features, real):.1f}, {sure:.0%}"


def main(workdir, *calls):
    enable_compilation_cache()
    exp, params, _, _ = load_run(workdir, overrides={"parallel.runner": "jit"})
    data = exp.config.data
    train, test = (open_source(data.name, data.dir, split, image_size=data.image_size,
                               channels=data.channels) for split in ("train", "test"))
    judge = classifier.shared(train).params
    real = small_cnn.outputs(judge, train.array()).features
    draw = sampling(exp, params, len(test))
    calls = [int(n) for n in calls] or CALLS
    held = judged(small_cnn.outputs(judge, test.array()), real)
    print(f"FD-cnn and share of sure ones, {len(test)} images each; held-out real images: {held}\n")
    print("| sampler | " + " | ".join(map(str, calls)) + " |\n|---" + "|---" * len(calls) + "|")
    for name in SAMPLERS:
        row = []
        for steps in calls:
            try:
                images, made = draw(name, steps)
            except UserError:      # too few for this sampler
                row.append("-")
                continue
            found = judged(small_cnn.outputs(judge, images), real)
            row.append(found + (f" ({made} calls)" if made != steps else ""))
        print(f"| `{name}` | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
