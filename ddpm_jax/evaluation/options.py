"""The options of an evaluation, and the constants that its parts share."""

from typing import NamedTuple

DEFAULT_NUM = 5_000        # samples of most metrics
REPORTED_NUM = 50_000      # samples of a number to report
ALONG_NUM = 1_000          # samples whose predicted x_0 are evaluated along the chain
OFFLINE_REALS = 10_000     # real images of each split that `offline` compares with
NN_QUERIES, NN_K = 16, 8   # samples whose nearest neighbours are shown, and how many of each
REAL_BATCH = 256           # given or real images at a time


class Options(NamedTuple):
    """The user's choices, as the flags of `ddpm evaluate`; None takes the default of the run or of
    the metric (splits: train, and test where the data set has one)."""
    metrics: tuple = ("bpd", "offline")
    protocol: str = "paper"
    quantise: str | None = None
    num: int | None = None
    bpd_num: int | None = None
    splits: tuple | None = None
    seed: int = 0
    batch_size: int | None = None
    sampler: str | None = None
    steps: int | None = None
    nodes: str | None = None
    guidance: float | None = None
    reference: str | None = None
    inception_weights: str | None = None
    allow_unknown_weights: bool = False
    classifier_dir: str | None = None
    force: bool = False
    keep_images: bool = False
    crop: int | None = None
    prefix: str = "--"      # of the names of these options in messages


class StoppedError(Exception):
    """A signal ended the evaluation; finished shards are on disk."""
