"""cifar10 with v-prediction (Salimans & Ho 2022): the network predicts alpha eps - sigma x_0, which
is defined at every noise level, and the error of v is weighted as it is (SNR + 1 in units of x_0).

Machine and hours: as cifar10. Not in the paper; not run here. The betas are changed so that the
last step leaves no signal (Lin et al. 2023).
"""

from ddpm_jax.configs import cifar10


def get_config():
    config = cifar10.get_config()
    config.diffusion.update(predict="v", zero_terminal_snr=True)
    return config
