"""MNIST at its own 28x28 grey pixels, otherwise as fashion_mnist. Not in the paper."""

from ddpm_jax.configs import fashion_mnist


def get_config():
    config = fashion_mnist.get_config()
    config.data.name = "mnist"
    return config
