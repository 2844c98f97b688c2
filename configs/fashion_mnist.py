"""Fashion-MNIST at its own 28x28 grey pixels, a narrow U-Net for one small machine.

28 can be halved twice: three resolutions, 28, 14, 7. Not in the paper.
"""

from ddpm_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.update(name="fashion_mnist", image_size=28, channels=1)
    config.model.update(ch=64, ch_mult=(1, 2, 2), attn_resolutions=(14,))
    config.train.update(steps=20_000, steps_per_dispatch=20)
    config.optimizer.warmup_steps = 500
    config.ema.decay = 0.999
    config.checkpoint.update(every=1000, keep_every=0)
    config.eval.sample_every = 1000
    return config
