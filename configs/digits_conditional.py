"""digits with labels: the class is chosen with `ddpm sample --label=3`.

Machine and minutes: as digits. Guidance: --guidance=2, or sampler.guidance.
"""

from ddpm_jax.configs import digits


def get_config():
    config = digits.get_config()
    config.model.num_classes = 10
    return config
