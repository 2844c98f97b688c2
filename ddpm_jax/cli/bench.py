"""ddpm bench WHAT [flags]

Measure this machine (step, sample, data, eval, statistics) or XLA's compiler (compile), in one
format.

  ddpm bench step --config=digits                  a training step: ms, images/s, MFU
  ddpm bench step --config=cifar10 --compare=diffusers --config.model.dtype=bfloat16
  ddpm bench step --config=digits --profile=trace  and the costliest kernels by class
  ddpm bench sample --config=digits                a denoising step, images/s
  ddpm bench data --config=digits                  the input pipeline
  ddpm bench eval --config=cifar10                 Inception features, as a share of sampling
  ddpm bench statistics                            FID and IS from 50,000 features, host memory
  ddpm bench compile --matrix=small --out=now.json --baseline=before.json --export=corpus
  ddpm bench sweep --config=cifar10 --topology=h100 --out=sweep.json
                                                   cost as batch, image, width, devices grow
  ddpm bench page --results=benchmarks             BENCHMARKS.md and its plots from the JSON there

Times are medians of rounds with the fastest and the slowest; MFU is n/a where the chip's peak is
not in the table. --baseline ends with 1 and names what got worse.
"""

import os
import pathlib
import time

from ddpm_jax.cli import common
from ddpm_jax.errors import UserError
from ddpm_jax.storage import files


def define_flags(define):
    define.config()
    define.integer("repeats", 20, "rounds at most")
    define.float("seconds", 20.0, "stop after this long, but not before three rounds")
    define.path("out", None, "write the result as JSON into this new file")
    define.string("compare", None, "step: diffusers, or diffusers_compiled (torch.compile)")
    define.path("profile", None, "step, sample: new folder for a trace")
    define.string("matrix", "small", "compile: small, absent, programs or a JSON file of "
                        "lists by program, config, runner, dtype, level, topology, set")
    define.path("baseline", None, "compile: an older result to compare with")
    define.path("export", None, "compile: folder for a corpus of StableHLO modules")
    define.string("topology", "h100", "sweep: a kind of machine of `ddpm compile`: h100, v5e")
    define.path("results", "benchmarks", "page: folder of JSON results")
    define.path("page", "BENCHMARKS.md", "page: file to write; plots go beside --results")


FLAGS = None  # of the call of main
DENOISING_STEPS = 20      # in one program, where loops run on the device


def _images(exp, count):
    """Random images, the same each time: [count,H,W,C] uint8."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (count, *exp.image_shape), np.uint8)


def _start():
    """The experiment of --config on this machine, with the cache on. -> (Experiment, note)"""
    from ddpm_jax import experiment
    from ddpm_jax.compilation.cache import enable_compilation_cache

    config = common.required(FLAGS, "config")
    folder = enable_compilation_cache()
    print(f"compilation cache: {folder or 'off'}")
    return experiment.build(config)


def _about(exp) -> dict:

    return {"config": common.config_name(FLAGS), "dtype": exp.config.model.dtype,
            "runner": exp.config.parallel.runner}


def _first_call(call) -> str:
    """Run a program for the first time: what was compiled, in how long, hit or miss."""
    from ddpm_jax.compilation.cache import count_compilations

    before = time.perf_counter()
    with count_compilations() as done:
        call()
    longest = f" ({max(done, key=lambda c: c.seconds)})" if done else ""
    return f"{time.perf_counter() - before:.1f} s{longest}"


def _profiled(call, lowered) -> None:
    """Trace one call into --profile and print its kernels."""
    import jax

    from ddpm_jax.compilation import report, timing

    folder = report.check_folder(FLAGS.profile)
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


def step() -> list[dict]:
    """A training step on random images, and the same U-Net of another library in turn with it."""
    import jax
    import numpy as np

    from ddpm_jax import experiment, programs
    from ddpm_jax.benchmark import peers
    from ddpm_jax.cli.compile import network_work
    from ddpm_jax.compilation import timing

    exp = _start()
    config, runner = exp.config, exp.runner
    batch = config.train.batch_size
    most = config.train.steps_per_dispatch if runner.loops_on_device else 1
    count = max(batch, 1024) if config.data.resident else None
    program = programs.train_program(exp, count, most=most)
    images = (runner.put("replicated", _images(exp, count).reshape(count, -1)) if count else
              runner.put("steps", _images(exp, most * batch).reshape(
                  most, batch, *exp.image_shape)))
    state = programs.pack_program(exp)(experiment.new_state(exp))
    seed, steps = np.uint32(config.seed), np.int32(most)

    calls = -(-peers.STEPS // most)

    def ours():
        nonlocal state
        for _ in range(calls):
            state, metrics = program(state, images, seed, steps)
        jax.block_until_ready(metrics)

    first = _first_call(ours)
    candidates, scale = {"ddpm_jax": ours}, {"ddpm_jax": most * calls}
    if FLAGS.compare:
        candidates[FLAGS.compare], scale[FLAGS.compare] = peers.training(FLAGS.compare, config)
    times = timing.rounds(candidates, repeats=FLAGS.repeats, seconds=FLAGS.seconds)
    if FLAGS.profile:
        config.train.steps_per_dispatch = most
        _profiled(ours, lambda: program.lower(*programs.train_arguments(exp, count)))
    per_step = {name: [t / scale[name] for t in seconds] for name, seconds in times.items()}
    flops = batch * network_work(exp).train_flops
    rows = [timing.result("step", name="ddpm_jax", times=timing.Times.of(per_step["ddpm_jax"]),
                          images=batch, flops=flops, devices=jax.devices(), first_call=first,
                          steps_per_dispatch=most, **_about(exp))]
    if FLAGS.compare:
        ratio = timing.ratios(per_step[FLAGS.compare], per_step["ddpm_jax"])
        rows[0]["ratio"] = (f"{ratio.median:.2f} x {FLAGS.compare} "
                            f"({ratio.low:.2f} ... {ratio.high:.2f})")
        rows.append(timing.result(
            "step", name=FLAGS.compare, times=timing.Times.of(per_step[FLAGS.compare]),
            images=batch, flops=flops, devices=jax.devices(), **_about(exp)))
    return rows


def _chain_run(exp, chain, batch):
    """-> run(), which draws a batch of images with weights of zero and waits for them."""
    import jax
    import numpy as np

    from ddpm_jax import programs

    program = programs.sample_program(exp, chain)
    params = exp.runner.put("replicated", jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype), exp.abstract_state.params))
    index = exp.runner.put("batch", np.arange(batch, dtype=np.int32))
    return lambda: jax.block_until_ready(program(params, np.uint32(0), index))


def sample() -> list[dict]:
    """One denoising step of the sampler, from whole chains."""
    import jax

    from ddpm_jax import programs
    from ddpm_jax.cli import compile as compiled
    from ddpm_jax.compilation import timing

    exp = _start()
    batch = exp.config.sampler.batch_size
    chain = programs.sampling_chain(exp)
    run = _chain_run(exp, chain, batch)
    first = _first_call(run)
    times = timing.rounds({"ours": run}, repeats=FLAGS.repeats, seconds=FLAGS.seconds)["ours"]
    if FLAGS.profile:
        made = compiled.sample(exp, None)
        _profiled(run, lambda: made.jitted.lower(*made.args))
    per_step = timing.Times.of([t / chain.num_steps for t in times])
    row = timing.result("sample", name="ddpm_jax", times=per_step, images=batch,
                        flops=batch * compiled.network_work(exp).forward_flops,
                        devices=jax.devices(), first_call=first, denoising_steps=chain.num_steps,
                        finished_images_per_s=batch / (per_step.median * chain.num_steps),
                        **_about(exp))
    return [row]


def data() -> list[dict]:
    """A batch of the input pipeline as training reads it, without the device."""
    from ddpm_jax.compilation import timing
    from ddpm_jax.data import feed
    from ddpm_jax.data.datasets import open_source

    config = common.required(FLAGS, "config")
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
    times = timing.rounds(candidates, repeats=FLAGS.repeats * 10, seconds=FLAGS.seconds)
    return [timing.result("data", name=name, times=timing.Times.of(t), images=batch,
                          config=common.config_name(FLAGS), threads=config.data.threads)
            for name, t in times.items()]


def evaluation() -> list[dict]:
    """Inception features of one batch of images, with random weights, and their sums on the host,
    beside one denoising step of as many images: the share of an evaluation's sampling time."""
    import jax
    import numpy as np

    from ddpm_jax import programs
    from ddpm_jax.cli import compile as compiled
    from ddpm_jax.compilation import timing
    from ddpm_jax.evaluation import moments
    from ddpm_jax.evaluation.inception import network

    exp = _start()
    made = compiled.inception(exp, None)
    generator = np.random.default_rng(0)
    params = exp.runner.put("replicated", jax.tree.map(
        lambda s: generator.normal(0, 0.02, s.shape).astype(s.dtype), made.args[0]))
    images = exp.runner.put("batch", _images(exp, made.images))

    def run():
        jax.block_until_ready(made.jitted(params, images))

    first = _first_call(run)
    sums = moments.empty(network.FEATURES)
    features = generator.normal(size=(made.images, network.FEATURES)).astype(np.float32)
    steps = DENOISING_STEPS if exp.runner.loops_on_device else 1
    denoise = _chain_run(exp, programs.sampling_chain(exp, steps=steps), made.images)
    denoise()
    candidates = {"Inception-2015": run, "sums of features": lambda: moments.add(sums, features),
                  "denoising step": denoise}
    times = timing.rounds(candidates, repeats=FLAGS.repeats, seconds=FLAGS.seconds)
    times["denoising step"] = [t / steps for t in times["denoising step"]]
    chain = programs.sampling_chain(exp).num_steps
    flops = {"Inception-2015": made.flops,
             "sums of features": 2.0 * network.FEATURES ** 2 * made.images,
             "denoising step": made.images * compiled.network_work(exp).forward_flops}
    rows = [timing.result("eval", name=name, times=timing.Times.of(t), images=made.images,
                          flops=flops[name], devices=jax.devices(), **_about(exp))
            for name, t in times.items()]

    def share(cost):
        return (cost["Inception-2015"] + cost["sums of features"]) / (
            chain * cost["denoising step"])

    by_time = share({r["name"]: r["seconds"]["median"] for r in rows})
    rows[0] |= {"first_call": first, "denoising_steps": chain, "share_of_flops": share(flops),
                "share_of_time": by_time,
                "note": f"with the sums {share(flops):.2%} of the FLOPs and {by_time:.2%} of the "
                        f"time of {chain} denoising steps"}
    return rows


STATISTICS_OF = 50_000      # images, as the paper's


def statistics() -> list[dict]:
    """FID and IS from the features of 50,000 images, as the end of an evaluation computes them."""
    import resource

    import numpy as np

    from ddpm_jax.compilation import timing
    from ddpm_jax.evaluation import measures, moments, references, scores
    from ddpm_jax.evaluation.inception import network

    generator = np.random.default_rng(0)
    features = generator.random((STATISTICS_OF, network.FEATURES), np.float32)
    reference = references.Reference(
        *moments.mean_and_cov(features[:4 * network.FEATURES]), n=4 * network.FEATURES)
    last = {"kernel": generator.standard_normal((network.FEATURES, network.CLASSES),
                                                np.float32) / 45}

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    before = peak()
    times = timing.rounds({"FID": lambda: measures.fid(features, reference),
                           "IS": lambda: scores.is_openai10(features, last)},
                          repeats=FLAGS.repeats, seconds=FLAGS.seconds)
    memory = f"+{peak() - before:.2f} GiB of host memory at most beyond the features"
    return [timing.result("statistics", name=name, times=timing.Times.of(t), images=STATISTICS_OF,
                          note=memory, cpus=os.cpu_count()) for name, t in times.items()]


MEASURED = {"step": step, "sample": sample, "data": data, "eval": evaluation,
            "statistics": statistics}


def _compile() -> int:
    from ddpm_jax.benchmark import matrix

    cells = matrix.cells(FLAGS.matrix)
    old = matrix.read(FLAGS.baseline) if FLAGS.baseline else None
    export = pathlib.Path(FLAGS.export) if FLAGS.export else None
    rows = []
    for number, cell in enumerate(cells, 1):
        print(f"[{number}/{len(cells)}] {cell.name}", flush=True)
        rows.append(matrix.run_cell(cell, export))
    print("\n" + matrix.table(rows))
    if FLAGS.out:
        files.write_json(FLAGS.out, rows, sort_keys=False)
    worse = matrix.regressions(rows, old) if old is not None else []
    for line in worse:
        print(f"REGRESSION {line}")
    if old is not None and not worse:
        print(f"no regression against {FLAGS.baseline}")
    return 1 if worse or any("error" in r for r in rows) else 0


SWEEPS = {
    "batch": ((16, 64, 256), lambda value: {"train.batch_size": value}),
    "image size": ((16, 32, 64), lambda value: {"data.image_size": value}),
    "width": ((64, 128, 256), lambda value: {"model.ch": value}),
    "devices": ((1, 2, 8), lambda value: {"train.batch_size": 64 * value}),
}


def _sweep() -> int:
    """The training step of --config at growing sizes, 64 images a device where not swept, clipped
    by its global norm, one step a dispatch."""
    from ddpm_jax.cli import compile as compiled
    from ddpm_jax.compilation import report

    config = common.required(FLAGS, "config")
    compiled.prepare_host()
    joint = ":" if FLAGS.topology in ("h100", "cpu") else "-"
    options = report.compiler_options(None if joint == ":" else "O0")
    rows, seen = [], {}
    for axis, (values, change) in SWEEPS.items():
        for value in values:
            devices = value if axis == "devices" else 1
            mine = config.copy_and_resolve_references()
            changes = {"train.batch_size": 64, "train.clip_scope": "global",
                       "train.steps_per_dispatch": 1, **change(value)}
            with mine.unlocked():
                mine.update_from_flattened_dict(changes)
            key = (devices, mine.to_json())
            if key not in seen:
                topology = f"{FLAGS.topology}{joint}{devices}"
                print(f"{axis} {value} on {topology}", flush=True)
                seen[key] = compiled.measure(
                    mine, topology=topology, program="train_step", options=options,
                    num_examples=50_000, name=common.config_name(FLAGS)).report
            rows.append({**seen[key], "sweep": [axis, value],
                         "cell": f"{axis} {value} on {seen[key]['about']['topology']}"})
    if FLAGS.out:
        files.write_json(FLAGS.out, rows, sort_keys=False)
    return 0


def _page() -> int:
    from ddpm_jax.benchmark import page

    files = page.write(FLAGS.results, FLAGS.page)
    print(", ".join(files))
    return 0


OTHERS = {"compile": _compile, "sweep": _sweep, "page": _page}


def main(values, words):
    known = [*MEASURED, *OTHERS]
    if len(words) != 1 or words[0] not in known:
        raise UserError(f"say what to measure: ddpm bench {'|'.join(known)}"
                        + (f" (not {' '.join(words)})" if words else ""))
    global FLAGS
    FLAGS = values
    if FLAGS.out and pathlib.Path(FLAGS.out).exists():
        raise UserError(f"out: {FLAGS.out} exists; name another file")
    if words[0] in OTHERS:
        return OTHERS[words[0]]()
    from ddpm_jax.compilation import report, timing

    report.check_folder(FLAGS.profile)
    rows = MEASURED[words[0]]()
    print(timing.render(rows))
    if FLAGS.out:
        files.write_json(FLAGS.out, rows, sort_keys=False)
    return 0
