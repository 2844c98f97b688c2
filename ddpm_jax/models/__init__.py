"""The network (flax.linen), independent of diffusion."""

from ddpm_jax.models.unet import UNet

__all__ = ["UNet"]
