"""Devices and processes, independent of diffusion."""
