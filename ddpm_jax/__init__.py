"""Denoising Diffusion Probabilistic Models (Ho, Jain & Abbeel 2020) in JAX."""

__version__ = "0.1.0"
