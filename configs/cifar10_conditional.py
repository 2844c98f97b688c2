"""cifar10 with labels, for class-conditional sampling and classifier-free guidance (Ho & Salimans
2021).

Machine and hours: as cifar10. Not in the paper, and no number is published for this network. Of
other conditional models the paper's Table 1 has FID 14.73 (BigGAN) and 2.67 (StyleGAN2 + ADA).
"""

from ddpm_jax.configs import cifar10


def get_config():
    config = cifar10.get_config()
    config.model.num_classes = 10
    return config
