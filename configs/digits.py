"""scikit-learn's 1,797 handwritten digits, 8x8 grey: the config of launch/quickstart.sh, which
needs no download.

Machine and minutes: two CPU cores, four minutes of training (docs/small-runs.md). Not in the paper.
"""

from ddpm_jax.configs import default


def get_config():
    config = default.get_config()
    config.data.update(name="digits", image_size=8, channels=1, flip=False)
    config.model.update(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,),
                        num_groups=8, dropout=0.0)
    config.diffusion.update(num_timesteps=500, predict="v", variance="learned_range",
                            loss="hybrid")
    config.diffusion.schedule = dict(name="cosine", offset=0.0, max_beta=0.25)
    # Chosen by benchmarks/digits_sweep.py, row v-6600.
    config.train.update(steps=6600, batch_size=32, steps_per_dispatch=100, clip_scope="global")
    config.optimizer.update(learning_rate=2e-3, warmup_steps=200, decay_steps=6600)
    config.ema.decay = 0.9975
    config.checkpoint.update(every=2200, keep=2, keep_every=0)
    config.eval.update(sample_every=3300, sample_num=16)
    config.sampler.batch_size = 500
    return config
