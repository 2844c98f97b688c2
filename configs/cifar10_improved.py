"""CIFAR-10 of Nichol & Dhariwal 2021: --config=cifar10_improved:CELL, unconditional, 500,000 steps.

CELL             T      betas    loss      their bits/dim / FID (Table 2)
linear1000       1000   linear   L_simple  3.73 / 3.29
linear           4000   linear   L_simple  3.37 / 2.90
linear_hybrid    4000   linear   L_hybrid  3.26 / 3.07
cosine           4000   cosine   L_simple  3.26 / 3.05
cosine_hybrid    4000   cosine   L_hybrid  3.17 / 3.19   (the default)
cosine_vlb       4000   cosine   L_vlb     2.94 / 11.47  (t drawn by importance)

Machine and hours: not run here, and not given there. Their network also has four attention heads,
and the timestep scales the features as well as shifting them; here the blocks are those of Ho et
al. Loss and chain are theirs. Their linear betas are scaled by 1000 / T.
"""

from ddpm_jax.configs import default

CELLS = {
    "linear1000": dict(num_timesteps=1000, schedule="linear", loss="mse"),
    "linear": dict(num_timesteps=4000, schedule="linear", loss="mse"),
    "linear_hybrid": dict(num_timesteps=4000, schedule="linear", loss="hybrid"),
    "cosine": dict(num_timesteps=4000, schedule="cosine", loss="mse"),
    "cosine_hybrid": dict(num_timesteps=4000, schedule="cosine", loss="hybrid"),
    "cosine_vlb": dict(num_timesteps=4000, schedule="cosine", loss="vlb"),
}


def get_config(cell="cosine_hybrid"):
    if cell not in CELLS:
        raise ValueError(f"no cell {cell!r}; known: {', '.join(CELLS)}")
    config, c = default.get_config(), CELLS[cell]
    scale = 1000 / c["num_timesteps"]
    schedule = {"linear": dict(name="linear", beta_start=scale * 1e-4, beta_end=scale * 0.02),
                "cosine": dict(name="cosine")}[c["schedule"]]
    config.diffusion.num_timesteps = c["num_timesteps"]
    with config.unlocked():
        config.diffusion.schedule = schedule
    config.diffusion.loss = c["loss"]
    if c["loss"] != "mse":
        config.diffusion.variance = "learned_range"
    config.data.flip = False
    config.model.update(num_res_blocks=3, attn_resolutions=(16, 8), dropout=0.3)
    config.train.update(steps=500_000, clip_norm=0.0, clip_scope="global")
    config.optimizer.update(learning_rate=1e-4, warmup_steps=0, eps_rule="optax")
    return config
