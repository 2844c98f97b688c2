"""Reference statistics of a dataset's real images."""

import json

import jax

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import measures, moments, protocols, references
from ddpm_jax.evaluation.evaluate import check_options, load_weights
from ddpm_jax.evaluation.features import gatherer, image_draws
from ddpm_jax.evaluation.options import REAL_BATCH, Options
from ddpm_jax.evaluation.records import same_everywhere, versions
from ddpm_jax.parallel.runners import RUNNERS
from ddpm_jax.storage import files


def make_reference(source, options: Options, out, *, features: int, overwrite=False, stop=None,
                   say=lambda text: None) -> None:
    """Statistics of the first images (default: all) of a split, written to ``out``.

    Shards are kept beside ``out`` until it is written. Raises StoppedError, UserError.
    """
    protocol = check_options(options)
    inception = load_weights(options)
    runner = RUNNERS["jit"](jax.devices())
    num = min(len(source), options.num or len(source))
    if num < 2:
        raise UserError(f"--num={num}: statistics need 2 images or more")
    folder = f"{out}.shards"
    batch = options.batch_size or REAL_BATCH
    gather = gatherer(folder, stop, protocol, say, {})
    found = gather("real", image_draws(runner, source.__getitem__, batch), num,
                   {"fingerprint": source.fingerprint, "batch": batch},
                   {"inception": inception.params})
    if jax.process_index() == 0:
        _write_reference(source, found["pool_3"], protocol, inception, out, features, overwrite)
        files.remove(folder)
        if num <= measures.DIMENSIONS:
            say(f"warning: {num} images cannot fill a {measures.DIMENSIONS}-dimensional "
                "covariance: FID against this file means little (use kid)")
    same_everywhere({})      # the file is there for every process that reads it next


def _write_reference(source, pool_3, protocol, inception, out, features, overwrite):
    mu, sigma = moments.mean_and_cov(pool_3)
    references.save(out, references.Reference(
        mu, sigma, len(pool_3), source.name, source.split, protocols.describe(protocol),
        inception.state_sha256, source.fingerprint, tuple(source.shape),
        pool_3[:features] if features else None,
        json.dumps(versions(), sort_keys=True), str(out)), overwrite=overwrite)
