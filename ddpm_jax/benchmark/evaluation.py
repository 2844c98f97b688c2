"""What an evaluation costs: Inception's features beside sampling, and the statistics at its end."""

import os
import resource

import jax
import numpy as np

from ddpm_jax import programs
from ddpm_jax.benchmark import compiled
from ddpm_jax.benchmark.bench import Bench, first_call, random_images
from ddpm_jax.benchmark.sample import chain_run
from ddpm_jax.compilation import roofline, timing
from ddpm_jax.evaluation import measures, moments, references, scores
from ddpm_jax.evaluation.inception import network

DENOISING_STEPS = 20      # in one program, where loops run on the device
STATISTICS_OF = 50_000    # images, as the paper's


def evaluation(bench: Bench) -> list[dict]:
    """Inception features of one batch of images, with random weights, and their sums on the host,
    beside one denoising step of as many images: the share of an evaluation's sampling time."""
    exp = bench.start()
    made = compiled.inception(exp, None)
    generator = np.random.default_rng(0)
    params = exp.runner.put("replicated", jax.tree.map(
        lambda s: generator.normal(0, 0.02, s.shape).astype(s.dtype), made.args[0]))
    images = exp.runner.put("batch", random_images(exp, made.images))

    def features_of_batch():
        jax.block_until_ready(made.jitted(params, images))

    first = first_call(features_of_batch)
    sums = moments.empty(network.FEATURES)
    features = generator.normal(size=(made.images, network.FEATURES)).astype(np.float32)
    steps = DENOISING_STEPS if exp.runner.loops_on_device else 1
    denoise = chain_run(exp, programs.sampling_chain(exp, steps=steps), made.images)
    denoise()
    times = bench.rounds({"Inception-2015": features_of_batch,
                          "sums of features": lambda: moments.add(sums, features),
                          "denoising step": denoise})
    times["denoising step"] = [t / steps for t in times["denoising step"]]
    flops = {"Inception-2015": made.flops,
             "sums of features": 2.0 * network.FEATURES ** 2 * made.images,
             "denoising step": made.images * roofline.unet_work(exp.model).forward_flops}
    rows = [bench.row("eval", name, t, images=made.images, flops=flops[name])
            for name, t in times.items()]
    rows[0] |= {"first_call": first} | _shares(
        programs.sampling_chain(exp).num_steps, flops,
        {r["name"]: r["seconds"]["median"] for r in rows})
    return rows


def _shares(chain, flops, seconds) -> dict:
    """Features and their sums as a share of `chain` denoising steps."""
    def share(cost):
        return (cost["Inception-2015"] + cost["sums of features"]) / (
            chain * cost["denoising step"])

    return {"denoising_steps": chain, "share_of_flops": share(flops),
            "share_of_time": share(seconds),
            "note": f"with the sums {share(flops):.2%} of the FLOPs and {share(seconds):.2%} of "
                    f"the time of {chain} denoising steps"}


def statistics(bench: Bench) -> list[dict]:
    """FID and IS from the features of 50,000 images, as the end of an evaluation computes them."""
    generator = np.random.default_rng(0)
    features = generator.random((STATISTICS_OF, network.FEATURES), np.float32)
    reference = references.Reference(
        *moments.mean_and_cov(features[:4 * network.FEATURES]), n=4 * network.FEATURES)
    last = {"kernel": generator.standard_normal((network.FEATURES, network.CLASSES),
                                                np.float32) / 45}

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    before = peak()
    times = bench.rounds({"FID": lambda: measures.fid(features, reference),
                          "IS": lambda: scores.is_openai10(features, last)})
    memory = f"+{peak() - before:.2f} GiB of host memory at most beyond the features"
    return [timing.result("statistics", name=name, times=timing.Times.of(t), images=STATISTICS_OF,
                          note=memory, cpus=os.cpu_count()) for name, t in times.items()]
