"""Other libraries' training steps, for `ddpm bench step --compare`: the same U-Net and batch.

torch and diffusers are optional dependencies, imported when a comparison is wanted.
"""

import numpy as np

from ddpm_jax.diffusion.schedule import Schedule
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import network
from ddpm_jax.interchange.diffusers.fields import unet_config

STEPS = 3  # of a timed call


def _need_diffusers():
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise UserError(f"compare: {error.name} is not installed; run: "
                        "pip install torch diffusers") from None
    return torch, diffusers


def unet(config):
    """diffusers' UNet2DModel of the config's network: the same parameters and multiply-adds.

    Raises UserError for a network that diffusers does not have.
    """
    _, diffusers = _need_diffusers()
    fields = unet_config(network(config))
    return diffusers.UNet2DModel(**{k: v for k, v in fields.items() if not k.startswith("_")})


def training(name: str, config, schedule: Schedule):
    """-> (a call of STEPS training steps that waits for the last, STEPS).

    Adam, clip to config.train.clip_norm, EMA; bf16 autocast and channels_last where the config
    computes in bfloat16. Raises UserError for an unknown name or without PyTorch and diffusers.
    """
    if name not in PEERS:
        raise UserError(f"compare: {name!r} is not known; known: {', '.join(PEERS)}")
    torch, _ = _need_diffusers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = config.model.dtype == "bfloat16"
    layout = torch.channels_last if bf16 else torch.contiguous_format
    model = unet(config).to(device, memory_format=layout)
    average = [p.detach().clone() for p in model.parameters()]
    adam = torch.optim.Adam(model.parameters(), lr=config.optimizer.learning_rate, fused=True)
    steps = config.diffusion.num_timesteps
    signal = torch.tensor(np.asarray(schedule.alphas_cumprod), device=device)
    shape = (config.train.batch_size, config.data.channels,
             config.data.image_size, config.data.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def loss_of(x, t, noise):
        a = signal[t][:, None, None, None]
        x_t = (a.sqrt() * x + (1 - a).sqrt() * noise).to(memory_format=layout)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            output = model(x_t, t, return_dict=False)[0][:, :shape[1]]  # without a variance
            return (output.float() - noise).square().mean()

    loss_of = PEERS[name](torch, loss_of)

    def one():
        x = images.float() / 127.5 - 1
        t = torch.randint(0, steps, (shape[0],), device=device)
        loss_of(x, t, torch.randn_like(x)).backward()
        if config.train.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        adam.step()
        adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, list(model.parameters()), 1 - config.ema.decay)

    def run():
        for _ in range(STEPS):
            one()
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    return run, STEPS


PEERS = {"diffusers": lambda torch, loss: loss,
         "diffusers_compiled": lambda torch, loss: torch.compile(loss)}
