"""Devices and processes; knows nothing of diffusion."""
