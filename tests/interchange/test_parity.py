"""The verdict, and what it stands on: this project against real diffusers on PyTorch's CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_up import SMALL, flat, random_params, small_config

from ddpm_jax import experiment, programs
from ddpm_jax.config import load_config, to_json
from ddpm_jax.interchange import parameter_names, parity
from ddpm_jax.interchange.diffusers.fields import unet_config
from ddpm_jax.interchange.diffusers.write import write_folder
from ddpm_jax.training import rng

SHAPE = (4, 4, 3)


def eps_of(x, t):
    return np.sin(x * (1 + t))


def test_the_fixed_input_never_changes():
    x, timesteps = parity.fixed_input((2, 2, 1), 1000)
    assert timesteps == (0, 333, 666, 999) and parity.fixed_input(SHAPE, 50)[1] == (0, 16, 33, 49)
    expected = np.random.RandomState(200611239).standard_normal((1, 2, 2, 1))
    np.testing.assert_array_equal(x, expected.astype(np.float32))


@pytest.mark.parametrize("change, result", [
    (lambda e: e, "PASS"), (lambda e: e * (1 + 0.9e-4), "PASS"), (lambda e: e * (1 + 2e-4), "FAIL"),
    (lambda e: e + np.float32(np.nan), "FAIL"), (lambda e: e[..., ::-1], "FAIL"),
    (lambda e: np.where(np.arange(e.size).reshape(e.shape) == 40, 9.0, e), "FAIL"),
])
def test_pass_and_fail(change, result):
    verdict = parity.verdict(lambda x, t: change(eps_of(x, t)), (eps_of, "someone"), SHAPE, 1000)
    assert verdict.result == result and result in str(verdict) and "someone" in str(verdict)


def test_an_error_at_one_timestep_is_enough():
    verdict = parity.verdict(lambda x, t: eps_of(x, t) + (t == 999), (eps_of, "someone"), SHAPE,
                             1000)
    assert verdict.result == "FAIL" and verdict.max_abs == pytest.approx(1, rel=1e-6)


def test_without_a_peer_nothing_is_claimed(monkeypatch):
    verdict = parity.verdict(eps_of, None, SHAPE, 1000)
    assert verdict.result == "not compared" and "PASS" not in str(verdict)
    import sys
    monkeypatch.setitem(sys.modules, "torch", None)
    assert parity.diffusers_peer({}) is None


# ---- against real diffusers ----

CIFAR10, LSUN = "cifar10", "lsun_church"


def build(config):
    return experiment.build_model(config, jax.devices()[:1])


def torch_net(config, params):
    import diffusers as lib
    import torch

    model = experiment.network(config)
    net = lib.UNet2DModel(**{k: v for k, v in unet_config(model).items() if k[0] != "_"})
    state = parameter_names.state_dict_from_params(params, model)
    net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    return net.eval()


def to_torch(x):
    import torch
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


def from_torch(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def relative(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def forward_and_gradients(config, batch, ts, backward=True):
    """Largest relative errors of eps and of the loss's gradients, and the least activity of any
    parameter."""
    import torch

    exp = build(config)
    params = random_params(exp.model)
    r = np.random.default_rng(1)
    x = r.standard_normal((batch, *exp.image_shape), dtype=np.float32)
    noise = r.standard_normal((*x.shape[:3], exp.model.out_channels), dtype=np.float32)
    t = np.array(ts, np.int32)
    net = torch_net(config, params)
    model = exp.model
    labels = np.arange(batch, dtype=np.int32) if model.num_classes else None

    def loss(p):
        eps = model.apply({"params": p}, x, t, labels=labels)
        return jnp.mean((eps - noise) ** 2), eps

    with jax.default_matmul_precision("highest"):
        if backward:
            (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        else:
            ours, grads = jax.jit(lambda p: loss(p)[1])(params), None
    with torch.set_grad_enabled(backward):
        theirs = net(to_torch(x), torch.from_numpy(t),
                     None if labels is None else torch.from_numpy(labels)).sample
    errors = {"eps": relative(ours, from_torch(theirs)), "scale": float(theirs.abs().max())}
    if backward:
        ((theirs - to_torch(noise)) ** 2).mean().backward()
        grads_theirs = flat(parameter_names.params_from_state_dict(
            {k: v.grad.numpy() for k, v in net.named_parameters()}, exp.model))
        largest = max(np.abs(g).max() for g in grads_theirs.values())
        errors["grad"] = max(
            np.abs(np.asarray(g) - grads_theirs[k]).max() / largest
            for k, g in flat(jax.tree.map(np.asarray, grads)).items())
        # A key's bias cannot matter (softmax ignores it); every other parameter has to, which a
        # norm with one channel a group would prevent.
        errors["least"] = min(np.abs(g).max() / largest for k, g in grads_theirs.items()
                              if not k.endswith(".k.bias"))
    return errors


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_small_net_and_its_gradients_agree():
    """With labels and a learned variance, which the others have not."""
    pytest.importorskip("diffusers")
    config = small_config(model={"num_classes": 2}, diffusion={"variance": "learned_range"})
    errors = forward_and_gradients(config, 3, [0, 20, 49])
    assert 0.1 < errors["scale"] < 10 and errors["least"] > 1e-4
    assert errors["eps"] < 1e-4 and errors["grad"] < 1e-4


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_cifar10_net_and_its_gradients_agree():
    pytest.importorskip("diffusers")
    config = load_config(CIFAR10)
    config.model.dropout = 0.0
    errors = forward_and_gradients(config, 2, [3, 900])
    print("cifar10", errors)
    assert 0.1 < errors["scale"] < 10 and errors["least"] > 1e-4
    assert errors["eps"] < 1e-4 and errors["grad"] < 1e-4


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("size", [64, pytest.param(256, marks=pytest.mark.soak)])
def test_256_net_agrees(size):
    """At 64x64 the same weights, attention after the same blocks, and a sixteenth of the work."""
    pytest.importorskip("diffusers")
    config = load_config(LSUN)
    config.data.image_size, config.model.attn_resolutions = size, (size // 16,)
    errors = forward_and_gradients(config, 1, [500], backward=False)
    print("lsun_church", size, errors)
    assert 0.1 < errors["scale"] < 10 and errors["eps"] < 1e-4


@pytest.mark.soak
@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_256_nets_gradients_agree_on_smaller_images():
    """The six levels of the 256x256 network on 64x64 images: their gradients fit the memory."""
    pytest.importorskip("diffusers")
    config = load_config(LSUN)
    config.data.image_size = 64
    errors = forward_and_gradients(config, 1, [500])
    print("lsun_church, 64x64", errors)
    assert errors["eps"] < 1e-4 and errors["grad"] < 1e-4 and errors["least"] > 1e-5


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_the_verdict_passes_and_a_changed_weight_fails():
    pytest.importorskip("diffusers")
    config = small_config()
    exp, params = build(config), random_params(SMALL)
    peer = parity.peer_of_params(exp.model, params)
    apply = jax.jit(exp.model.apply)

    def ours(p):
        return lambda x, t: apply({"params": p}, x, np.full(1, t, np.int32))

    verdict = parity.verdict(ours(params), peer, exp.image_shape, 50)
    assert verdict.result == "PASS" and "diffusers" in verdict.peer
    # The two same-shaped projections of one attention block, exchanged.
    attention = params["down_1_attn_0"]
    params["down_1_attn_0"] = {**attention, "k": attention["v"], "v": attention["k"]}
    assert parity.verdict(ours(params), peer, exp.image_shape, 50).result == "FAIL"


# ---- the chain ----


def noise_for(exp, seed, count):
    """The noise that `ddpm sample` draws: t -> [count,H,W,C]; t = -1 is x_T."""
    key, index = rng.run_key(np.uint32(seed)), jnp.arange(count, dtype=jnp.int32)
    return lambda t: np.asarray(rng.image_noise(key, index, jnp.int32(t), exp.image_shape))


def feed_noise(monkeypatch, noises):
    """Make diffusers' pipeline and scheduler draw ``noises`` (channels last), in that order."""
    import diffusers.pipelines.ddpm.pipeline_ddpm as pipeline
    import diffusers.schedulers.scheduling_ddpm as scheduler

    waiting = iter(noises)
    for module in (pipeline, scheduler):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: to_torch(next(waiting)))
    return waiting


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_fifty_steps_on_the_same_noise_give_the_same_images(tmp_path, monkeypatch, variance):
    lib = pytest.importorskip("diffusers")
    count, seed, T = 4, 3, 50
    config = small_config(diffusion={
        "variance": variance,
        "first_log_variance": {"fixed_large": "next", "fixed_small": "floor"}[variance]})
    exp, params = build(config), random_params(SMALL)
    write_folder(tmp_path / "out", params, exp, to_json(config), step=0, weights="averaged",
                 version="0")
    chain = programs.sampling_chain(exp)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(programs.sample_program(exp, chain)(
            exp.runner.put("replicated", params), np.uint32(seed),
            exp.runner.put("batch", np.arange(count, dtype=np.int32))))
    noise = noise_for(exp, seed, count)
    waiting = feed_noise(monkeypatch, [noise(-1), *(noise(t) for t in range(T - 1, 0, -1))])
    pipeline = lib.DDPMPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=count, num_inference_steps=T, output_type="np").images
    assert next(waiting, None) is None  # every step drew its noise
    theirs = np.round(images * 255).astype(np.int16)
    difference = np.abs(ours.astype(np.int16) - theirs)
    print(variance, "levels differ in", (difference > 0).mean(), "of the pixels")
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    inside = ((ours > 5) & (ours < 250)).mean()
    assert ours.std() > 20 and inside > 0.5  # neither flat nor clipped all over


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variance, first, predict", [
    ("fixed_large", "next", "eps"), ("fixed_small", "floor", "eps"), ("fixed_small", "floor", "v"),
    ("learned_range", "next", "eps")])
def test_every_step_of_the_released_chains(monkeypatch, variance, first, predict):
    """diffusers computes its tables in float32: 1e-4 of the image's range is what that costs."""
    lib = pytest.importorskip("diffusers")
    import torch

    from ddpm_jax.diffusion.prediction import PARAMETERIZATIONS, VARIANCES, p_mean_variance
    from ddpm_jax.diffusion.sampling import ancestral_step
    from ddpm_jax.diffusion.schedule import linear, make_schedule

    scheduler = lib.DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02,
                                  variance_type=variance, clip_sample=True,
                                  prediction_type={"eps": "epsilon", "v": "v_prediction"}[predict])
    schedule = make_schedule(linear(1000), first_log_variance=first)

    @jax.jit
    def step(x, output, t, noise):
        prediction = p_mean_variance(
            schedule, output, x, jnp.full(1, t), predict=PARAMETERIZATIONS[predict],
            variance=VARIANCES[variance], clip_denoised=True)
        return ancestral_step(schedule, prediction, x, t, noise)[0]

    r = np.random.default_rng(0)
    kept = np.cumprod(1 - linear(1000))
    worst = 0.0
    for t in range(1000):
        x_0, e, wrong, noise = r.uniform(-1, 1, (4, 1, 4, 4, 3))
        noise, e = 3 * noise, 2 * e
        x = np.float32(np.sqrt(kept[t]) * x_0 + np.sqrt(1 - kept[t]) * e)
        target = {"eps": e, "v": np.sqrt(kept[t]) * e - np.sqrt(1 - kept[t]) * x_0}[predict]
        output = np.concatenate(
            [target + 0.2 * wrong, wrong][:VARIANCES[variance].channels], axis=-1)
        output, noise = np.float32(output), np.float32(noise)
        feed_noise(monkeypatch, [noise])
        theirs = scheduler.step(to_torch(output), t, to_torch(x)).prev_sample
        worst = max(worst, np.abs(from_torch(theirs) - np.asarray(step(x, output, t, noise))).max())
    print(variance, "largest difference of a step:", worst)
    assert worst < 2e-4
    assert isinstance(theirs, torch.Tensor)
