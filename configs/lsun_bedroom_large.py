"""The paper's large model on LSUN Bedroom, ch = 192: 255,677,955 parameters (Table 3, App. B).

Machine and hours: the paper gives none for this model; 2.25 times the arithmetic of lsun_bedroom.
Expect (the paper's): FID 4.90 by StyleGAN2's code, after 1,150,000 steps.
"""

from ddpm_jax.configs import lsun_bedroom


def get_config():
    config = lsun_bedroom.get_config()
    config.model.ch = 192
    config.train.steps = 1_150_000
    return config
