"""The paper's 256x256 model on LSUN Church (Table 3).

Machine and hours (the paper's): TPU v3-8, 2.2 steps/s, 6.3 days for 1,200,000 steps.
Expect (the paper's): FID 7.89 by StyleGAN2's code.
The released Church weights were trained for 4,432,000 steps, not 1,200,000.
"""

from ddpm_jax.configs import celebahq256


def get_config():
    config = celebahq256.get_config()
    config.data.update(name="lsun_church")
    config.train.steps = 1_200_000
    return config
