"""The network (flax.linen); knows nothing of diffusion."""
