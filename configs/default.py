"""Every field there is, with the paper's CIFAR-10 values; the other configs change a few.

Not meant to be trained itself: take cifar10.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    return ConfigDict(dict(
        seed=0,
        data=dict(
            name="cifar10",       # a row of ddpm_jax/data/datasets.py
            dir="",               # where `ddpm data prepare` put it; "" = ~/.cache/ddpm_jax/data
            image_size=32,
            channels=3,
            flip=True,            # mirror each image with probability 1/2
            resident=True,        # keep the images on the device (small sets); else stream them
            threads=16,           # decoding threads of a streamed set
        ),
        model=dict(
            ch=128,
            ch_mult=(1, 2, 2, 2),
            num_res_blocks=2,
            attn_resolutions=(16,),
            dropout=0.1,
            num_groups=32,
            space_to_depth=1,
            num_classes=0,        # of labels that the network takes; 0 = none (the paper's)
            label_dropout=0.1,    # probability of training without the label, for guidance
            remat=False,          # recompute blocks in the backward pass: less memory, more time
            dtype="float32",      # what products are computed in; parameters stay float32
        ),
        diffusion=dict(
            num_timesteps=1000,
            schedule=dict(name="linear", beta_start=1e-4, beta_end=0.02),
            predict="eps",        # eps, x_start, x_prev, v
            variance="fixed_large",     # fixed_large, fixed_small, learned, learned_range
            first_log_variance="next",  # at t = 0: next (CIFAR-10 code), floor (256x256 code)
            loss="mse",           # mse (L_simple), kl (a term of the bound), hybrid (both), vlb
                                  # (the bound, with t drawn by importance)
            weights=dict(         # of mse by timestep: a row of WEIGHTS, diffusion/objective.py
                name="target",    # target (plain), l_simple, constant, snr_plus_one,
                                  # truncated_snr, min_snr, p2
                gamma=placeholder(float),   # min_snr (None = 5), p2 (None = 1)
                k=placeholder(float),       # p2; None = 1
            ),
            zero_terminal_snr=False,    # betas changed so that the last step leaves no signal
        ),
        train=dict(
            steps=800_000,
            batch_size=128,       # global, of one update
            accumulation=1,       # micro-batches that a device takes in turn
            steps_per_dispatch=50,
            log_every=100,
            clip_scope="per_replica",   # per_replica (what the paper ran), global
            clip_norm=1.0,        # 0 = off
            clip_replicas=8,      # equal parts of a batch that are clipped on their own
            random="threefry",    # threefry; rbg, unsafe_rbg: cheaper, results depend on the layout
        ),
        optimizer=dict(
            learning_rate=2e-4,
            warmup_steps=5000,
            decay_steps=0,        # updates until a cosine has taken the rate to 0; 0 = no decay
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            eps_rule="tensorflow",      # tensorflow (the paper's), optax
        ),
        ema=dict(decay=0.9999),
        parallel=dict(
            runner="shard_map",   # jit, pmap, shard_map
            shards=1,             # devices over which the state is cut, in training; 1 = whole on
                                  # each; more need runner jit
            cut="optimizer",      # optimizer (moments and average: ZeRO-1), params (weights too:
                                  # FSDP)
            norm_kernel="auto",   # xla; stored (for CPUs); on NVIDIA GPUs kernels:
                                  # triton, triton_padded (more shapes); auto: the fastest
                                  # measured on the device
            clip_kernel="auto",   # gradients of filters where a device clips several parts of a
                                  # batch: convolutions, turned (for CPUs), kernels (for NVIDIA
                                  # GPUs); auto: the fastest measured on the device
        ),
        checkpoint=dict(
            every=10_000,
            keep=3,               # newest
            keep_every=50_000,    # and every multiple of this
        ),
        eval=dict(
            sample_every=10_000,  # a grid of samples (0 = never)
            sample_num=64,
            every=0,              # metrics of ``metrics`` (0 = never)
            metrics="offline",    # separated by commas, as `ddpm evaluate --metrics`
            num=2000,             # generated images
            bpd_num=1000,         # real images for bits/dim
            best="",              # keep the checkpoint with the lowest value of this metric too
        ),
        sampler=dict(
            name="ancestral",     # a row of SAMPLERS, ddpm_jax/diffusion/sampling.py
            steps=0,              # network calls for an image; 0 = num_timesteps
            nodes="",             # timesteps visited: even, logsnr, quad, leading, trailing, or a
                                  # list such as "0,20,99"; "" = as the sampler needs
            clip_denoised=placeholder(bool),       # None = where the sampler can
            guidance=1.0,         # classifier-free, of a model with classes; 1 = off
            dynamic_threshold=placeholder(float),  # share of pixels that set the bound on x_start,
                                  # such as 0.995, in place of clipping; None = off
            eta=placeholder(float),                # ddim: noise, 0 to 1; None = 0
            lower_order_final=placeholder(bool),   # multistep samplers; None = False
            batch_size=256,       # global
        ),
    ))
