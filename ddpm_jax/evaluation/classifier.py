"""The small classifier of a data set: trained once, stored, the same on all processes.

Inside functions: optax, needed for training alone.
"""

import contextlib
import hashlib
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddpm_jax.data.datasets import read_rows
from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import small_cnn
from ddpm_jax.evaluation.options import OFFLINE_REALS
from ddpm_jax.evaluation.progress import Progress
from ddpm_jax.evaluation.subset import ORDER, subset
from ddpm_jax.parallel import hosts
from ddpm_jax.storage import files

BATCH = 128
HELD_OUT = 0.2
TRAINING_IMAGES = 5 * OFFLINE_REALS
PROGRESS_EVERY = 20      # steps between two calls of progress: each waits for the device


class Stored(NamedTuple):
    """params, held-out accuracy, and the sha256 that names the weights in a key."""
    params: dict
    accuracy: float
    sha256: str

    @property
    def key(self) -> str:
        return f"FD-cnn@{self.sha256[:8]}"


# ---- training ----


def default_epochs(images: int) -> int:
    """About 40,000 to 250,000 images seen: enough for features, seconds for a small set."""
    return int(np.clip(60_000 // max(images, 1), 4, 40))


def _shifted(images, key):
    """Each image moved by up to an eighth of its side, edges repeated."""
    reach = max(1, min(images.shape[1:3]) // 8)
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * reach + 1)
    return jax.vmap(lambda image, o: jax.lax.dynamic_slice(
        image, (o[0], o[1], 0), images.shape[1:]))(padded, offsets)


def train_classifier(images, labels, seed: int, *, classes: int | None = None,
                     epochs: int | None = None, progress=None):
    """-> (params, accuracy on the held-out fifth). images uint8 [N,H,W,C]; labels int [N]; classes:
    default the largest label and one.

    Deterministic in its arguments on one kind of machine. AdamW with a cosine rate, small shifts.
    progress(steps done, of how many).
    """
    import optax

    images, labels = np.asarray(images, np.uint8), np.asarray(labels, np.int32)
    order = np.random.default_rng(seed).permutation(len(images))
    cut = max(1, int(len(images) * HELD_OUT))
    held, kept = order[:cut], order[cut:]
    batch = min(BATCH, len(kept))
    steps = len(kept) // batch
    epochs = default_epochs(len(kept)) if epochs is None else epochs
    module = small_cnn.Classifier(classes or int(labels.max()) + 1)
    key = jax.random.key(seed)
    params = module.init(key, small_cnn.scaled(images[:1]))["params"]
    tx = optax.adamw(optax.cosine_onecycle_schedule(epochs * steps, 3e-3), weight_decay=1e-3)

    # One step a dispatch: inside a scan XLA's CPU backend runs convolutions many times slower.
    @jax.jit
    def step(params, opt_state, images, labels, key):
        def loss(params):
            x = _shifted(small_cnn.scaled(images), key)
            logits = module.apply({"params": params}, x).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, rng = tx.init(params), np.random.default_rng(seed)
    for n in range(epochs * steps):
        if n % steps == 0:
            rows = kept[rng.permutation(len(kept))[:steps * batch]].reshape(steps, batch)
        now = rows[n % steps]
        params, opt_state = step(params, opt_state, images[now], labels[now],
                                 jax.random.fold_in(key, n))
        if progress is not None and n % PROGRESS_EVERY == 0:
            jax.block_until_ready(params)
            progress(n + 1, epochs * steps)
    params = jax.tree.map(np.asarray, params)
    found = small_cnn.outputs(params, images[held]).logits.argmax(1)
    return params, float(np.mean(found == labels[held]))


# ---- trained once for each data set ----


def sha256(params) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(flatten_dict(params, sep="/").items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cache_folder(environ=None) -> str:
    """In the user's cache; it begins with ~ where the user has no home."""
    environ = os.environ if environ is None else environ
    home = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "ddpm_jax")


def train_once(name: str, fingerprint: str, images, labels, *, classes: int | None = None,
               folder=None, seed: int = 0, say=lambda text: None) -> Stored:
    """The stored classifier of this data, trained and stored on first use.

    fingerprint names the data (`Source.fingerprint`); folder defaults to the user's cache. Share
    the file between machines: retraining elsewhere gives other weights, hence another scale. Where
    it cannot be stored it is kept in memory, with a warning.
    """
    short = hashlib.sha256(fingerprint.encode()).hexdigest()[:8]
    path = files.join(folder or cache_folder(), f"cnn-{name}-{short}-{seed}.npz")
    stored = False
    with contextlib.suppress(UserError):  # a home that may not be looked into
        stored = files.exists(path)
    if stored:
        arrays = files.read_npz(path)
    else:
        say(f"training the small classifier of {name}, once")
        params, accuracy = train_classifier(
            images, labels, seed, classes=classes,
            progress=Progress(say, f"classifier of {name}", "steps"))
        arrays = flatten_dict(params, sep="/") | {"accuracy": np.array(accuracy)}
        try:
            if path.startswith("~"):
                raise UserError("this user has no home")
            files.write_npz(path, arrays)
        except UserError as error:
            say(f"warning: {error}: the small classifier is not kept and is trained again by the "
                "next command; --classifier_dir names a folder for it")
    accuracy = float(arrays.pop("accuracy"))
    params = unflatten_dict(arrays, sep="/")
    return Stored(params, accuracy, sha256(params))


def shared(source, *, folder=None, say=lambda text: None) -> Stored | None:
    """`train_once` of a Source's images (at most TRAINING_IMAGES, by `subset`) on process 0, the
    result on all; None where the data have no labels."""
    if source.labels is None:
        return None
    stored, classes = None, int(source.labels.max()) + 1
    if hosts.is_main_process():
        rows = subset(len(source), TRAINING_IMAGES)
        fingerprint = source.fingerprint + (f" {ORDER}" if len(rows) < len(source) else "")
        stored = train_once(
            source.name, fingerprint, read_rows(source.__getitem__, rows), source.labels[rows],
            classes=classes, folder=folder, say=say)
    if jax.process_count() == 1:
        return stored
    module = small_cnn.Classifier(classes)
    shapes = jax.eval_shape(lambda: module.init(
        jax.random.key(0), small_cnn.scaled(jnp.zeros((1, *source.shape), jnp.uint8))))["params"]
    params = stored.params if stored else jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    params = hosts.broadcast_arrays(params)
    accuracy = hosts.broadcast_json(stored and stored.accuracy)
    return Stored(params, accuracy, sha256(params))
