"""Other libraries' training steps, for `ddpm bench step --compare`: the same U-Net and batch."""

from ddpm_jax.errors import UserError

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
    """diffusers' UNet2DModel with the config's shape: the same parameters and multiply-adds."""
    _, diffusers = _need_diffusers()
    model, size = config.model, config.data.image_size
    if model.space_to_depth != 1:
        raise UserError("compare: diffusers' U-Net has no space_to_depth")
    attends = [(size >> level) in model.attn_resolutions for level in range(len(model.ch_mult))]
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
    return diffusers.UNet2DModel(
        sample_size=size, in_channels=config.data.channels, out_channels=config.data.channels,
        layers_per_block=model.num_res_blocks, down_block_types=down, up_block_types=up,
        block_out_channels=[model.ch * m for m in model.ch_mult], attention_head_dim=None,
        norm_num_groups=model.num_groups, norm_eps=1e-6, dropout=model.dropout,
        downsample_padding=0, freq_shift=1, flip_sin_to_cos=False)


def training(name: str, config):
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
    law = config.diffusion.schedule
    betas = torch.linspace(law.get("beta_start", 1e-4), law.get("beta_end", 0.02), steps,
                           dtype=torch.float64)
    signal = torch.cumprod(1 - betas, 0).float().to(device)
    shape = (config.train.batch_size, config.data.channels,
             config.data.image_size, config.data.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    def loss_of(x, t, noise):
        a = signal[t][:, None, None, None]
        x_t = (a.sqrt() * x + (1 - a).sqrt() * noise).to(memory_format=layout)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return (model(x_t, t, return_dict=False)[0].float() - noise).square().mean()

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
