"""Reference statistics of a dataset's real images."""

import dataclasses
import json

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import extract, features, measures, moments, protocols, references
from ddpm_jax.evaluation.evaluate import check_options, load_weights
from ddpm_jax.evaluation.metrics import collect_features
from ddpm_jax.evaluation.options import REAL_BATCH, Options
from ddpm_jax.evaluation.records import versions
from ddpm_jax.evaluation.session import Session
from ddpm_jax.evaluation.subset import ORDER, subset
from ddpm_jax.parallel import hosts
from ddpm_jax.storage import files


def make_reference(source, options: Options, out, session: Session, *, num_features: int,
                   overwrite=False) -> None:
    """Statistics of the images of a split, or of options.num of them, written to ``out``, with the
    features of ``num_features`` images, all by `subset`.

    Shards are kept beside ``out`` until it is written. Raises StoppedError, UserError.
    """
    protocol = check_options(options)
    inception = load_weights(options)
    rows = subset(len(source), options.num)
    num, whole = len(rows), len(rows) == len(source)
    if num < 2:
        raise UserError(f"--num={num}: statistics need 2 images or more")
    session = dataclasses.replace(session, folder=f"{out}.shards")
    batch = options.batch_size or REAL_BATCH
    found = collect_features(
        session, "real", features.of_images(session, lambda i: source[rows[i]], batch),
        extract.make({"inception": inception.params}, precision=protocol.precision),
        num=num, batch=batch, facts={
            "fingerprint": source.fingerprint, "batch": batch} | ({} if whole else {"rows": ORDER}))
    if hosts.is_main_process():
        pool_3 = found["pool_3"]
        mu, sigma = moments.mean_and_cov(pool_3)
        references.save(out, references.Reference(
            mu, sigma, len(pool_3), source.name, source.split, protocols.describe(protocol),
            inception.state_sha256, source.fingerprint, tuple(source.shape),
            pool_3[subset(num, num_features) if whole else slice(num_features)]
            if num_features else None,
            json.dumps(versions(), sort_keys=True), str(out)), overwrite=overwrite)
        files.remove(session.folder)
        if num <= measures.DIMENSIONS:
            session.say(f"warning: {num} images cannot fill a {measures.DIMENSIONS}-dimensional "
                        "covariance: FID against this file means little (use kid)")
    hosts.broadcast_json(None)      # the file is there for every process that reads it next
