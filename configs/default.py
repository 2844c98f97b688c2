"""Every field there is, with the paper's CIFAR-10 values; the other configs change a few.

Not meant to be trained itself: take cifar10.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config():
    return ConfigDict(dict(
        seed=0,                   # of the first weights, the order of the images and all noise
        data=dict(
            name="cifar10",       # a row of DATASETS, data/datasets.py; `ddpm data --help`
                                  # lists them
            dir="",               # where `ddpm data prepare` put it; "" = $DDPM_DATA_DIR, or
                                  # ~/.cache/ddpm_jax/data
            image_size=32,        # side in pixels
            channels=3,           # 1 = grey, 3 = RGB
            flip=True,            # mirror each image with probability 1/2
            resident=True,        # keep the images on the device (small datasets); else stream them
            threads=16,           # decoding threads of a streamed dataset
        ),
        model=dict(
            ch=128,               # channels at the first resolution
            ch_mult=(1, 2, 2, 2),       # channels at each resolution, in units of ch; each
                                  # resolution has half the side of the one before
            num_res_blocks=2,     # residual blocks at a resolution; one more on the way up
            attn_resolutions=(16,),     # sides, after space_to_depth, at which attention follows
                                  # each block
            dropout=0.1,          # probability, in the residual blocks
            num_groups=32,        # of group norm
            space_to_depth=1,     # side of the blocks of pixels that become channels; 1 = none (the
                                  # paper's)
            num_classes=0,        # of labels that the network takes; 0 = none (the paper's)
            label_dropout=0.1,    # probability of training without the label, for guidance
            remat=False,          # recompute blocks in the backward pass: less memory, more time
            dtype="float32",      # what products are computed in; parameters stay float32
        ),
        diffusion=dict(
            num_timesteps=1000,   # T
            schedule=dict(
                name="linear",    # of the betas: linear, quad, const, jsd, warmup10,
                                  # warmup50, cosine, listed (diffusion/schedule.py)
                beta_start=1e-4,  # beta_1
                beta_end=0.02,    # beta_T
            ),
            predict="eps",        # what the network predicts: eps, x_start, x_prev, v
            variance="fixed_large",     # of a reverse step: fixed_large, fixed_small, learned,
                                  # learned_range
            first_log_variance="next",  # the log variance at t = 0: next (that of t = 1: CIFAR-10
                                  # code), floor (1e-20: 256x256 code)
            loss="mse",           # mse (L_simple), kl (a term of the bound), hybrid (both), vlb
                                  # (the bound, with t drawn by importance)
            weights=dict(         # a row of WEIGHTS, diffusion/objective.py
                name="target",    # of the square error, by timestep: target (plain), l_simple,
                                  # constant, snr_plus_one, truncated_snr, min_snr, p2
                gamma=placeholder(float),   # min_snr (None = 5), p2 (None = 1)
                k=placeholder(float),       # p2; None = 1
            ),
            zero_terminal_snr=False,    # betas changed so that the last step leaves no signal
        ),
        train=dict(
            steps=800_000,        # updates of the weights
            batch_size=128,       # images of one update, over all devices
            accumulation=1,       # micro-batches that a device takes in turn
            steps_per_dispatch=50,      # updates that one call of the program makes
            log_every=100,        # steps between lines of metrics.jsonl
            clip_scope="per_replica",   # what is clipped: the gradient of each part of a batch
                                  # (per_replica, what the paper ran), or their mean (global)
            clip_norm=1.0,        # the largest norm of a gradient; 0 = off
            clip_replicas=8,      # equal parts of a batch, with per_replica
            random="threefry",    # random bits: threefry; rbg, unsafe_rbg: cheaper, the results
                                  # depend on the layout over devices
        ),
        optimizer=dict(
            learning_rate=2e-4,   # of Adam
            warmup_steps=5000,    # updates in which the rate rises linearly from 0
            decay_steps=0,        # updates until a cosine has taken the rate to 0; 0 = no decay
            b1=0.9,               # decay of Adam's first moment
            b2=0.999,             # and of the second
            eps=1e-8,             # Adam's
            eps_rule="tensorflow",      # where eps is added: tensorflow (the paper's), optax
        ),
        ema=dict(decay=0.9999),   # of the average of the weights, which is sampled and evaluated
        parallel=dict(
            runner="shard_map",   # how a step is spread over devices: jit, pmap, shard_map
            shards=1,             # devices over which the state is cut, in training; 1 = whole on
                                  # each; more need runner jit
            cut="optimizer",      # optimizer (moments and average: ZeRO-1), params (weights too:
                                  # FSDP)
            norm_kernel="auto",   # form of group norm: auto (the fastest measured on the device),
                                  # xla, stored (for CPUs), triton, triton_padded (kernels for
                                  # NVIDIA GPUs; the latter for more shapes)
            attention_kernel="auto",    # form of attention: auto (as above), xla, triton (kernels
                                        # for NVIDIA GPUs)
            clip_kernel="auto",   # filter gradients where a device clips several parts of a batch:
                                  # auto (as above), convolutions, turned (for CPUs), kernels (for
                                  # NVIDIA GPUs)
        ),
        checkpoint=dict(
            every=10_000,         # steps between checkpoints
            keep=3,               # newest checkpoints that are kept
            keep_every=50_000,    # those of multiples of this step are kept too; 0 = none
        ),
        eval=dict(
            sample_every=10_000,  # steps between grids of samples; 0 = never
            sample_num=64,        # images of a grid
            every=0,              # steps between evaluations; 0 = never
            metrics="offline",    # of an evaluation, as `ddpm evaluate --metrics`
            num=2000,             # samples of an evaluation
            bpd_num=1000,         # real images for bits/dim
            best="",              # keep the checkpoint with the lowest value of this metric too
        ),
        sampler=dict(
            name="ancestral",     # ancestral, ddim, dpmpp_2m, ...: a row of SAMPLERS,
                                  # diffusion/sampling.py (docs/samplers.md)
            steps=0,              # network calls for an image; 0 = num_timesteps
            nodes="",             # timesteps visited: even, logsnr, quad, leading, trailing, or a
                                  # list such as "0,20,99"; "" = as the sampler needs
            clip_denoised=placeholder(bool),       # None = where the sampler can
            guidance=1.0,         # scale of classifier-free guidance, with classes; 1 = off
            dynamic_threshold=placeholder(float),  # share of pixels that set the bound on x_start,
                                  # such as 0.995, in place of clipping; None = off
            eta=placeholder(float),                # ddim: noise, 0 to 1; None = 0
            lower_order_final=placeholder(bool),   # multistep samplers; None = False
            batch_size=256,       # images at a time, over all devices
        ),
    ))
