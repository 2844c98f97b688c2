"""Fashion-MNIST at its own 28x28 grey pixels, a narrow U-Net for one small machine.

28 can be halved twice: three resolutions, 28, 14, 7. Not in the paper.
fashion_mnist:small, the config of `bash launch/quickstart.sh fashion`, takes minutes on a CPU: its
blocks of 2x2 pixels become channels, 14x14 of them (docs/small-runs.md).
"""

from ddpm_jax.configs import default, digits


def small():
    config = digits.get_config()
    config.data.update(name="fashion_mnist", image_size=28, flip=True)
    config.model.update(space_to_depth=2, attn_resolutions=(7,))
    config.train.steps = config.optimizer.decay_steps = 1800
    config.checkpoint.every = config.eval.sample_every = 600
    config.sampler.batch_size = 100
    return config


def full():
    config = default.get_config()
    config.data.update(name="fashion_mnist", image_size=28, channels=1)
    config.model.update(ch=64, ch_mult=(1, 2, 2), attn_resolutions=(14,))
    config.train.update(steps=20_000, steps_per_dispatch=20)
    config.optimizer.warmup_steps = 500
    config.ema.decay = 0.999
    config.checkpoint.update(every=1000, keep_every=0)
    config.eval.sample_every = 1000
    return config


SIZES = {"full": full, "small": small}


def get_config(size="full"):
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; known: {', '.join(SIZES)}")
    return SIZES[size]()
