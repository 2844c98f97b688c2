import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import digits, weights

from ddpm_jax import programs
from ddpm_jax.diffusion.nodes import NODES
from ddpm_jax.diffusion.sampling import SAMPLERS, Method, Sampler, ddim_step
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import build_model, build_training, new_state
from ddpm_jax.parallel.runners import fetch
from ddpm_jax.training.steps import Batch


def tiny(**fields):
    config = digits()
    config.data.image_size = 4
    config.model.update(ch=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=2)
    config.train.update(batch_size=8, clip_replicas=8)
    config.diffusion.num_timesteps = 6
    config.update_from_flattened_dict(fields)
    return config


@functools.cache
def model(devices, runner="jit"):
    """-> (Experiment, weights of order one on its devices)"""
    exp = build_model(tiny(**{"parallel.runner": runner}), jax.devices()[:devices])
    return exp, exp.runner.put("replicated", weights(exp.abstract_params))


def as_one_program(exp):
    return exp._replace(runner=exp.runner._replace(loops_on_device=True))


def host(exp):
    """As it is: a CPU's loop is on the host."""
    return exp


@pytest.mark.slow
def test_sampling_does_not_depend_on_runner_batch_devices_or_where_the_loop_is():
    """Each runner and each program with a loop here and a loop there."""
    wanted = frames = None
    for runner, devices, index, sample, progressive in [
            ("jit", 1, [0, 1, 2, 3], (host, as_one_program), as_one_program),
            ("shard_map", 8, range(8), (as_one_program,), host),
            ("pmap", 4, [3, 2, 1, 0], (host,), as_one_program)]:
        exp, params = model(devices, runner)
        chain = programs.sampling_chain(exp)
        index = np.array(index, np.int32)
        args = params, np.uint32(3), exp.runner.put("batch", index)

        def rows(images, exp=exp, index=index):
            return exp.runner.local(images)[np.argsort(index)][:4].astype(int)

        for where in sample:
            got = rows(programs.sample_program(where(exp), chain)(*args))
            wanted = got if wanted is None else wanted
            assert np.abs(got - wanted).max() <= 1
        if frames is None:
            last, frames = map(rows, programs.progressive_program(host(exp), chain, 4)(*args))
            assert np.abs(last - wanted).max() <= 1
            assert frames.shape == (4, 2, 4, 4, 1)
            # At t = 0 the mean of the last step is the predicted x_0.
            assert np.abs(frames[:, -1] - wanted).max() <= 1
        # Of a part of the images: the first ones.
        last, some = programs.progressive_program(progressive(exp), chain, 4, images=1)(*args)
        assert np.abs(rows(last) - wanted).max() <= 1
        some = exp.runner.local(some)
        assert len(some) == (1 if runner == "jit" else devices)
        assert np.abs(some[0].astype(int) - frames[index[0]]).max() <= 1
    assert wanted.std() > 1 and len(np.unique(wanted.reshape(4, -1), axis=0)) == 4


@pytest.fixture
def keeping(monkeypatch):
    """The name of a sampler that keeps what it predicts."""
    def step(schedule, prediction, x_t, t, noise, memory):
        x, _ = ddim_step(schedule, prediction, x_t, t, noise)
        return x, memory.at[:, t].set(prediction.x_start)

    monkeypatch.setitem(SAMPLERS, "keeping", Method(lambda alphas_cumprod: Sampler(
        step, lambda x_T: jnp.zeros((x_T.shape[0], 6, *x_T.shape[1:])))))
    return "keeping"


@functools.cache
def kept(name):
    """uint8 [2,6,H,W,C]: all that the steps of a chain of ``model(1)`` predicted, t = 0 first."""
    exp, params = model(1)
    index = exp.runner.put("batch", np.arange(2, dtype=np.int32))
    start, one = programs._reverse_process(exp, programs.sampling_chain(exp, name=name))
    carry, step = start(np.uint32(3), index), jax.jit(lambda *args: one(*args)[0])
    for i in range(6):
        carry = step(params, carry, i, np.uint32(3), index)
    return np.asarray(programs.to_uint8(carry[1]))


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 4, 6, 9])
def test_the_frames_kept_are_those_at_multiples(every, keeping):
    """A sampler that keeps what it predicts shows the frames."""
    exp, params = model(1)
    index = exp.runner.put("batch", np.arange(2, dtype=np.int32))
    _, frames = programs.progressive_program(
        as_one_program(exp), programs.sampling_chain(exp, name=keeping), every)(
        params, np.uint32(3), index)
    predicted = kept(keeping)
    want = predicted[:, [t for t in range(5, -1, -1) if t % every == 0]]
    assert frames.shape == want.shape and predicted.std() > 1
    assert np.abs(np.asarray(frames).astype(int) - want).max() <= 1


@pytest.mark.slow
def test_bound_does_not_depend_on_runner_devices_or_where_the_loop_is():
    images = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 1), dtype=np.uint8)
    found = []
    for runner, devices, where in (("jit", 2, host), ("jit", 2, as_one_program),
                                   ("pmap", 4, as_one_program), ("shard_map", 1, host)):
        exp, params = model(devices, runner)
        bound = programs.bound_program(where(exp))(
            params, np.uint32(3), *(exp.runner.put("batch", x) for x in (
                Batch(images), np.arange(4, dtype=np.int32))))
        found.append(jax.tree.map(exp.runner.local, bound))
        for name, one, two in zip(bound._fields, found[0], found[-1], strict=True):
            assert one.shape == two.shape and one.std() > 0
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6, err_msg=name)
    assert found[0].terms.shape == (4, 6)
    np.testing.assert_allclose(found[0].total, found[0].terms.sum(1) + found[0].prior, rtol=1e-5)


def test_fewer_steps_and_too_many():
    exp = build_model(tiny())
    assert programs.sampling_chain(exp, steps=3).num_steps == 3
    np.testing.assert_array_equal(
        programs.sampling_chain(exp, steps=3).schedule.timesteps, [0, 2, 5])
    with pytest.raises(UserError, match=r"sampler.steps=7 is not in 1 ... .*num_timesteps=6"):
        programs.sampling_chain(exp, steps=7)
    with pytest.raises(UserError, match="known: ancestral, ddim"):
        programs.sampling_chain(exp, name="euler")


@pytest.mark.slow
@pytest.mark.parametrize("name, steps, whole", [
    ("dpmpp_2m", 4, [("pmap", 4)]), ("unipc_3", 6, [("jit", 2)]), ("heun", 6, [("pmap", 4)]),
    ("dpm_solver_3", 5, [("jit", 2)]), *(
        pytest.param(name, steps, [("jit", 2), ("pmap", 4), ("shard_map", 1)],
                     marks=pytest.mark.soak)
        for name, steps in (("dpmpp_2m", 4), ("unipc_3", 6), ("heun", 6), ("dpm_solver_3", 5)))])
def test_every_sampler_draws_the_same_image_on_any_loop_and_runner(name, steps, whole):
    """And from its network calls: N of them for N steps, or the most below that it can use. A loop
    on the host is compared with programs that hold the loop."""
    drawn = []
    for runner, devices, where in (("shard_map", 1, host),
                                   *((*place, as_one_program) for place in whole)):
        exp, params = model(devices, runner)
        chain = programs.sampling_chain(exp, name=name, steps=steps)
        assert chain.num_steps == (5 if name == "heun" else steps)
        index = exp.runner.put("batch", np.arange(4, dtype=np.int32))
        program = programs.sample_program(where(exp), chain)
        drawn.append(exp.runner.local(program(params, np.uint32(3), index)).astype(int))
    for other in drawn[1:]:
        assert np.abs(other - drawn[0]).max() <= 1
    assert drawn[0].std() > 1


def test_a_chain_from_the_middle_has_its_own_plan():
    """Decoding half of the chain of a multistep sampler starts without history."""
    exp = build_model(tiny())
    whole = programs.sampling_chain(exp, name="dpmpp_2m", steps=6)
    lower = programs.sampling_chain(exp, name="dpmpp_2m", steps=6,
                                    below=int(whole.schedule.timesteps[3]) + 1)
    assert lower.num_steps == 4
    np.testing.assert_array_equal(lower.schedule.timesteps, whole.schedule.timesteps[:4])
    table, full = lower.sampler.step.args[0], whole.sampler.step.args[0]
    np.testing.assert_array_equal(table[:3], full[:3])
    assert table[3, 0, 2] == 0 != full[3, 0, 2]


@pytest.mark.parametrize("fields, message", [
    (dict(name="plms", clip_denoised=True), "plms mixes eps, which cannot be clipped"),
    (dict(name="dpmpp_2m", eta=0.5), "eta=0.5 is not of sampler.name=dpmpp_2m; its own: lower"),
    (dict(name="ddim", eta=2.0), "eta=2.0 is not in"),
    (dict(name="dpmpp_3m", steps=3), r"3 evaluations are too few: it needs 4 .*\(steps=4 works"),
    (dict(name="heun", steps=2), r"1 evaluations are too few: .* ddim \(steps=3 works\)$"),
    (dict(name="unipc_3", nodes="0,2,5"), "nodes=0,2,5: 3 evaluations are too few: .* or ddim$"),
    (dict(name="ddim", nodes="0,3"), "at timestep 3 of 6 are not; begin at 4 or later$"),
    (dict(name="ddim", nodes="leading", steps=2), r"at timestep 3 of 6.*\(steps=3 works\)$"),
    (dict(name="ddim", nodes="0,7"), "distinct timesteps of 0 ... 5"),
    (dict(name="ddim", nodes="evn"), "known: even, quad, logsnr"),
    (dict(name="pndm", steps=6), "four nodes"),
    (dict(name="ddim", steps=2, nodes="trailing", below=2), "no timestep under 2 is visited"),
    (dict(name="plms", dynamic_threshold=0.9), "dynamic_threshold=0.9 bounds x_start, and plms"),
    (dict(dynamic_threshold=0.9, clip_denoised=False), "and clip_denoised=False leaves it"),
])
def test_samplers_that_do_not_fit_are_one_line(fields, message):
    with pytest.raises(UserError, match=message):
        programs.sampling_chain(build_model(tiny()), **fields)


def test_every_short_chain_has_finite_tables_or_is_one_line():
    """All samplers, nodes and numbers of steps, so that no pair ends in an exception of numpy."""
    exp, fine = build_model(tiny(), jax.devices()[:1]), set()
    for name, nodes, steps in itertools.product(
            SAMPLERS, (*NODES, "0", "0,5", "0,1,2,3,5"), (None, *range(1, 7))):
        try:
            chain = programs.sampling_chain(exp, name=name, nodes=nodes, steps=steps)
        except UserError as error:
            assert "sampler." in str(error) and "\n" not in str(error)
            continue
        plan = getattr(chain.sampler.step, "args", ())
        assert all(np.isfinite(table).all() for table in (*chain.schedule, *plan[:1]))
        assert steps is None or chain.num_steps <= steps
        fine.add(name)
    assert fine == {*SAMPLERS} - {"pndm"}


@pytest.mark.slow
def test_a_chain_without_a_signal_at_its_end():
    exp = build_model(tiny(**{"diffusion.zero_terminal_snr": True, "diffusion.predict": "v"}),
                      jax.devices()[:1])
    assert exp.betas[-1] == 1
    for fields, message in ((dict(name="ddim", steps=2, nodes="leading"), "must be 5, not 3"),
                            (dict(name="dpmpp_2m", nodes="even"), "no signal, by which solvers"),
                            (dict(name="dpmpp_2m", steps=4), "nodes=logsnr: the last timestep")):
        with pytest.raises(UserError, match=message):
            programs.sampling_chain(exp, **fields)
    for name in ("ddim", "ancestral"):
        chain = programs.sampling_chain(exp, name=name, dynamic_threshold=0.9)
        params = jax.tree.map(lambda p: np.ones(p.shape, np.float32), exp.abstract_params)

        @jax.jit
        def last_step(params, x_t, chain=chain):
            prediction = chain.predict(params)(x_t, jnp.array([5]))
            return prediction.x_start, chain.sampler.step(
                chain.schedule, prediction, jnp.ones((1, 4, 4, 1)), 5, jnp.zeros((1, 4, 4, 1)),
                ())[0]

        x_start, x = last_step(params, np.full((1, 4, 4, 1), 3, np.float32))
        assert np.isfinite(x).all() and np.abs(x_start).max() <= 1


def test_another_sampler_takes_its_own_clipping_and_keywords():
    exp = build_model(tiny(**{"sampler.name": "ddim", "sampler.eta": 0.5,
                              "sampler.clip_denoised": True, "sampler.nodes": "0,3,5"}))
    assert programs.sampling_chain(exp).num_steps == 3
    with pytest.raises(UserError, match="nodes=0,3,5 lists the timesteps: leave steps out"):
        programs.sampling_chain(exp, steps=4)
    assert programs.sampling_chain(exp, steps=3).num_steps == 3
    assert programs.sampling_chain(exp, steps=4, nodes="even").num_steps == 4
    assert programs.sampling_chain(exp, name="plms", steps=6).num_steps == 6
    with pytest.raises(UserError, match="cannot be clipped"):
        build_model(tiny(**{"sampler.name": "plms", "sampler.clip_denoised": True}))


def training(devices=1, **fields):
    return build_training(build_model(tiny(**fields), jax.devices()[:devices]))


@pytest.mark.parametrize("runner", ["jit", "pmap", "shard_map"])
def test_abstract_arguments_fit_the_program(runner):
    trained = training(8, **{"parallel.runner": runner})
    for examples in (24, None):
        program = programs.train_program(trained, examples, max_steps=3)
        assert "main" in program.step.lower(*program.arguments).as_text()[:5000]


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, pytest.param(8, marks=pytest.mark.soak)])
def test_a_dispatch_stops_where_it_should_and_equals_single_steps(replicas):
    """num_steps is data: a shorter dispatch runs the same compiled program."""
    trained = training(**{"train.clip_scope": "per_replica", "train.clip_replicas": replicas,
                          "model.dropout": 0.1})
    images = np.random.default_rng(0).integers(0, 256, (24, 16), np.uint8)
    results = []
    for max_steps, calls in ((5, [3]), (1, [1, 1, 1])):
        program = programs.train_program(trained, 24, max_steps=max_steps)
        carry, losses = program.start(new_state(trained)), []
        for n in calls:
            carry, metrics = program.step(carry, Batch(images), np.uint32(7), np.int32(n))
            losses.append(metrics["loss"])
        results.append((program.state(carry), np.concatenate(losses)))
    (looped, rows), (single, losses) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                 fetch(looped), fetch(single))
    np.testing.assert_allclose(rows, [*losses, 0, 0], rtol=1e-5)
    assert int(looped.step) == 3


def test_a_carry_is_packed_and_read_back_as_the_named_state():
    trained = training()
    program = programs.train_program(trained, 24)
    state = new_state(trained)
    carry = program.start(state)
    assert len(jax.tree.leaves(carry.params)) < len(jax.tree.leaves(state.params)) / 2
    back = program.state(carry)
    assert jax.tree.structure(back) == jax.tree.structure(trained.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    jax.tree.map(np.testing.assert_array_equal, program.ema_params(carry), state.ema_params)
    assert max(np.abs(p).max() for p in jax.tree.leaves(jax.device_get(back.params))) > 0
