"""Model folders of huggingface/diffusers: UNet2DModel and DDPMScheduler, in and out.

Where the two chains differ (measured, tests/interchange/test_parity.py):
- DDPMScheduler computes its tables in float32, we in float64. With the released configs
  (clip_sample, fixed_large or fixed_small) one step on the same x_t, eps and noise differs by at
  most 8e-5 of images in [-1, 1], near t = 2; a chain of 50 steps gives the same 8-bit images.
- ``fixed_large`` there has no rule for the first step's log-variance. No noise is drawn at t = 0,
  so samples agree; the likelihood needs the rule, and an import sets the paper's for it.
- ``learned_range`` is the same in both, but for its lower bound at t = 0, where no noise is drawn.
  ``fixed_large_log`` and ``learned`` there are not the paper's: refused.
- Fewer inference steps than T: diffusers takes multiples of T // steps, we spread evenly from 0 to
  T-1; such images differ.
- Half precision: float16 and bfloat16 weights are read and widened; everything here is float32.
"""
