"""Denoising Diffusion Probabilistic Models (Ho, Jain & Abbeel 2020) in JAX.

    import ddpm_jax as ddpm

    run = ddpm.load("runs/digits")         # or a diffusers folder, or an official checkpoint
    images = run.sample(16, seed=0)        # uint8 [16,H,W,C]
    run.bits_per_dim(images)               # [16]
    run.denoise_fn, run.schedule           # the trained network and its chain
    ddpm.train(ddpm.load_config("digits", {"train.steps": 500}), "runs/short")
    ddpm.diffusion, ddpm.models            # the equations and the network alone

Nothing below is imported, JAX neither, before it is used.
"""

import importlib
import sys
import types

__version__ = "0.1.0"
_API = ("Run", "load", "load_config")
_PARTS = ("diffusion", "models", "train")


def __getattr__(name):
    if name in _API:
        return getattr(importlib.import_module("ddpm_jax.api"), name)
    if name in _PARTS:
        return importlib.import_module(f"ddpm_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_API, *_PARTS})


class _TrainModule(types.ModuleType):
    """The module ddpm_jax.train, which can be called as ``api.train``."""

    def __call__(self, config, workdir, **keywords):
        """See ``ddpm_jax.api.train``."""
        return importlib.import_module("ddpm_jax.api").train(config, workdir, **keywords)


class _Package(types.ModuleType):
    def __setattr__(self, name, value):
        # By whatever statement it is imported first, the import system sets it here.
        if name == "train" and isinstance(value, types.ModuleType):
            value.__class__ = _TrainModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
