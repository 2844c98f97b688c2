"""The paper's equations on plain arrays: no files, config, modules, keys or devices in here."""

from ddpm_jax.diffusion.likelihood import Bound, bpd_terms, prior_bpd
from ddpm_jax.diffusion.objective import LOSSES, hybrid_loss, mse_loss, vlb_loss
from ddpm_jax.diffusion.prediction import (
    PARAMETERIZATIONS,
    VARIANCES,
    Prediction,
    p_mean_variance,
)
from ddpm_jax.diffusion.process import q_mean_variance, q_posterior, q_sample
from ddpm_jax.diffusion.sampling import SAMPLERS, ancestral_step, ddim_step
from ddpm_jax.diffusion.schedule import BETAS, Schedule, cosine, linear, make_schedule, respace

__all__ = [
    "BETAS", "LOSSES", "PARAMETERIZATIONS", "SAMPLERS", "VARIANCES", "Bound", "Prediction",
    "Schedule", "ancestral_step", "bpd_terms", "cosine", "ddim_step", "hybrid_loss", "linear",
    "make_schedule", "mse_loss", "p_mean_variance", "prior_bpd", "q_mean_variance", "q_posterior",
    "q_sample", "respace", "vlb_loss",
]
