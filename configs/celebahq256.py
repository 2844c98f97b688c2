"""The paper's 256x256 model on CelebA-HQ (App. B).

Machine and hours (the paper's): TPU v3-8, 2.2 steps/s, 2.6 days for 500,000 steps.
Expect: the paper gives no FID; its samples are in Fig. 1.
"""

from ddpm_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.update(name="celeb_a_hq", image_size=256, resident=False)
    config.model.update(ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
    config.diffusion.update(variance="fixed_small", first_log_variance="floor")
    config.optimizer.learning_rate = 2e-5
    config.train.update(steps=500_000, batch_size=64, steps_per_dispatch=10)
    config.sampler.batch_size = 128
    return config
