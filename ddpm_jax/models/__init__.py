"""The network (flax.linen), independent of diffusion."""
