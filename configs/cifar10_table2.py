"""The six cells of Table 2: --config=cifar10_table2:CELL, unconditional CIFAR-10.

CELL              the paper's IS / FID
mu_learned_l      7.28 / 23.69
mu_fixed_l        8.06 / 13.22
mu_fixed_simple   unstable
eps_learned_l     unstable
eps_fixed_l       7.67 / 13.51
eps_fixed_simple  9.46 / 3.17   (the default; the same as cifar10)

Machine and hours: as cifar10. mu predicts the mean of x_{t-1} (predict=x_prev).
"""

from ddpm_jax.configs import default

CELLS = {
    "mu_learned_l": dict(predict="x_prev", variance="learned", loss="kl"),
    "mu_fixed_l": dict(predict="x_prev", variance="fixed_large", loss="kl"),
    "mu_fixed_simple": dict(predict="x_prev", variance="fixed_large", loss="mse"),
    "eps_learned_l": dict(predict="eps", variance="learned", loss="kl"),
    "eps_fixed_l": dict(predict="eps", variance="fixed_large", loss="kl"),
    "eps_fixed_simple": dict(predict="eps", variance="fixed_large", loss="mse"),
}


def get_config(cell="eps_fixed_simple"):
    if cell not in CELLS:
        raise ValueError(f"no cell {cell!r} in Table 2; known: {', '.join(CELLS)}")
    config = default.get_config()
    config.diffusion.update(CELLS[cell])
    return config
