"""The paper's 256x256 model on LSUN Bedroom (Table 3).

Machine and hours (the paper's): TPU v3-8, 2.2 steps/s, 12.6 days for 2,400,000 steps.
Expect (the paper's): FID 6.36 by StyleGAN2's code.
Mirrored as in the official code; the paper's text says Bedroom was not: data.flip=False.
"""

from ddpm_jax.configs import celebahq256


def get_config():
    config = celebahq256.get_config()
    config.data.update(name="lsun_bedroom")
    config.train.steps = 2_400_000
    return config
