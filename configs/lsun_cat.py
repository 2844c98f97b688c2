"""The paper's 256x256 model on LSUN Cat (Table 3).

Machine and hours (the paper's): TPU v3-8, 2.2 steps/s, 9.5 days for 1,800,000 steps.
Expect (the paper's): FID 19.75 by StyleGAN2's code.
Not mirrored, as in the official code; the paper's text says all sets but Bedroom were.
"""

from ddpm_jax.configs import celebahq256


def get_config():
    config = celebahq256.get_config()
    config.data.update(name="lsun_cat", flip=False)
    config.train.steps = 1_800_000
    return config
