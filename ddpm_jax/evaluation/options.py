"""What a user can choose of an evaluation, and the constants that its parts share."""

from typing import NamedTuple

OFFLINE_REALS = 10_000
DEFAULT_NUM = 5_000
REPORTED_NUM = 50_000
LOOKED_AT = 1_000      # images whose way is measured
NN_QUERIES, NN_K = 16, 8
DRAWN = {"fid": REPORTED_NUM, "is": REPORTED_NUM, "nn": NN_QUERIES}
REAL_BATCH = 256
REAL = "real-"
BOUND = "bpd"      # of real images, not of samples


class Options(NamedTuple):
    """What a user can choose; None takes the default of the run or the metric."""
    metrics: tuple = ("bpd", "offline")
    protocol: str = "paper"
    quantise: str | None = None
    num: int | None = None
    bpd_num: int | None = None
    splits: tuple = ("train", "test")
    seed: int = 0
    batch_size: int | None = None
    sampler: str | None = None
    steps: int | None = None
    ema: bool = True
    reference: str | None = None
    inception_weights: str | None = None
    allow_unknown_weights: bool = False
    classifier_dir: str | None = None
    force: bool = False
    keep_images: bool = False
    crop: int | None = None


class StoppedError(Exception):
    """A signal asked to leave; what is done is on disk."""
