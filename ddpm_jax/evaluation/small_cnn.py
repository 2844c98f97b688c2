"""Features without downloaded weights: a small classifier trained once per dataset, random ones.

The distance in the classifier's features is `FD-cnn@<hash8>`, in the random ones `FD-rand@<seed>`.
Both are regression signals for one dataset and one set of weights: never FID, and not comparable
with published numbers.
"""

import hashlib
import os
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.evaluation.frechet import frechet_distance
from ddpm_jax.evaluation.moments import mean_and_cov
from ddpm_jax.storage import files

WIDTHS = (32, 64, 128)
SMALL_SIDE = 16          # images up to this side get half the widths
FEATURES = 128
LARGEST_SIDE = 64
BATCH = 128
CONFIDENT = 0.9
HELD_OUT = 0.2
FEATURE_BATCH = 256


class Outputs(NamedTuple):
    """features float32 [B,128]; logits float32 [B,classes]."""
    features: jax.Array
    logits: jax.Array


class Classifier(nn.Module):
    """Two 3x3 convolutions a stage, halving until the side is at most 4; then one dense layer."""
    classes: int

    @nn.compact
    def __call__(self, x):
        stage, share = 0, 2 if max(x.shape[1:3]) <= SMALL_SIDE else 1
        while True:
            width = WIDTHS[min(stage, len(WIDTHS) - 1)] // share
            for _ in range(2):
                x = nn.relu(nn.Conv(width, (3, 3), kernel_init=nn.initializers.he_normal())(x))
            if min(x.shape[1:3]) <= 4:
                break
            x = nn.max_pool(x, (2, 2), (2, 2))
            stage += 1
        x = nn.relu(nn.Dense(FEATURES, name="features")(x.reshape(len(x), -1)))
        return Outputs(x, nn.Dense(self.classes, name="logits")(x))


def _scaled(images):
    """uint8 [B,H,W,C] in [0,255] -> float32 in [-1,1], at most 64 pixels a side."""
    x = jnp.asarray(images).astype(jnp.float32) / 127.5 - 1
    factor = -(-max(x.shape[1:3]) // LARGEST_SIDE)
    return nn.avg_pool(x, (factor, factor), (factor, factor)) if factor > 1 else x


def _shifted(images, key):
    """Each image moved by up to an eighth of its side, edges repeated."""
    reach = max(1, min(images.shape[1:3]) // 8)
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * reach + 1)
    return jax.vmap(lambda image, o: jax.lax.dynamic_slice(
        image, (o[0], o[1], 0), images.shape[1:]))(padded, offsets)


def classes_of(params) -> int:
    return params["logits"]["bias"].shape[0]


def apply(params, images) -> Outputs:
    """The network on uint8 or float images [B,H,W,C] in [0,255]; for use inside jit."""
    return Classifier(classes_of(params)).apply({"params": params}, _scaled(images))


def random_apply(params, images):
    """Means over each stage of a random network: float32 [B, 224], for use inside jit."""
    x, out = _scaled(images), []
    for kernel in params:
        x = jax.lax.conv_general_dilated(
            x, jnp.asarray(kernel), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST)
        x = nn.relu(x)
        out.append(x.mean((1, 2)))
        if min(x.shape[1:3]) > 1:
            x = nn.max_pool(x, (2, 2), (2, 2))
    return jnp.concatenate(out, axis=1)


def random_params(channels: int, seed: int = 0) -> list:
    """Kernels of the random network: numpy, the same on every machine."""
    rng = np.random.default_rng(seed)
    sizes = [channels, *WIDTHS]
    return [(rng.standard_normal((3, 3, a, b)) * np.sqrt(2 / (9 * a))).astype(np.float32)
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)]


TOLD_EVERY = 20      # steps between two calls of progress: each waits for the device


def default_epochs(images: int) -> int:
    """About 40,000 to 250,000 images seen: enough for features, seconds for a small set."""
    return int(np.clip(60_000 // max(images, 1), 4, 40))


def train_classifier(images, labels, seed: int, *, epochs: int | None = None, progress=None):
    """-> (params, accuracy on the held-out fifth). images uint8 [N,H,W,C]; labels int [N].

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
    module = Classifier(int(labels.max()) + 1)
    key = jax.random.key(seed)
    params = module.init(key, _scaled(images[:1]))["params"]
    tx = optax.adamw(optax.cosine_onecycle_schedule(epochs * steps, 3e-3), weight_decay=1e-3)

    # One step a dispatch: inside a scan XLA's CPU backend runs convolutions many times slower.
    @jax.jit
    def step(params, opt_state, images, labels, key):
        def loss(params):
            logits = module.apply({"params": params}, _shifted(_scaled(images), key)).logits
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
        if progress is not None and n % TOLD_EVERY == 0:
            jax.block_until_ready(params)
            progress(n + 1, epochs * steps)
    params = jax.tree.map(np.asarray, params)
    accuracy = float(np.mean(probabilities(params, images[held]).argmax(1) == labels[held]))
    return params, accuracy


_apply = jax.jit(apply)
_random_apply = jax.jit(random_apply)


def _batched(function, images):
    """function over images in batches of one size (the last one is padded), rows joined."""
    images = np.asarray(images)
    size = min(FEATURE_BATCH, len(images))
    out = []
    for start in range(0, len(images), size):
        part = images[start:start + size]
        pad = size - len(part)
        full = np.concatenate([part, np.repeat(part[-1:], pad, axis=0)]) if pad else part
        out.append(np.asarray(function(full))[:len(part)])
    return np.concatenate(out)


def features(params, images) -> np.ndarray:
    """float32 [N,128] of uint8 images [N,H,W,C]."""
    return _batched(lambda x: _apply(params, x).features, images)


def probabilities(params, images) -> np.ndarray:
    """float32 [N,classes] of uint8 images [N,H,W,C]; rows sum to 1."""
    return _batched(lambda x: jax.nn.softmax(_apply(params, x).logits), images)


def random_features(images, seed: int = 0) -> np.ndarray:
    """float32 [N,224] of uint8 images [N,H,W,C]."""
    params = random_params(np.shape(images)[-1], seed)
    return _batched(lambda x: _random_apply(params, x), images)


def distance(features_a, features_b) -> float:
    """Frechet distance between two sets of features [N,D]."""
    return frechet_distance(*mean_and_cov(features_a), *mean_and_cov(features_b))


def class_report(params, samples, reals, held_out=None) -> dict:
    """What the classifier says of samples next to what it says of real images.

    samples, reals, held_out: uint8 [N,H,W,C]; without held_out, reals are cut in two seeded halves.
    -> frechet_samples and frechet_reals (held-out reals against the rest, the floor), at equal
    N; confident_samples, confident_reals: share with a largest probability above 0.9;
    classes_samples, classes_reals: share of each class; n: images a side.
    """
    if held_out is None:
        order = np.random.default_rng(0).permutation(len(reals))
        held_out, reals = reals[order[:len(reals) // 2]], reals[order[len(reals) // 2:]]
    n = min(len(samples), len(held_out))
    base = features(params, reals)
    report = {"n": n}
    for name, images in (("samples", samples), ("reals", held_out)):
        p = probabilities(params, images)
        shares = np.bincount(p.argmax(1), minlength=p.shape[1]) / len(p)
        report |= {f"frechet_{name}": distance(features(params, images[:n]), base),
                   f"confident_{name}": float(np.mean(p.max(1) > CONFIDENT)),
                   f"classes_{name}": [float(s) for s in shares]}
    return report


# --- trained once per dataset, stored ----------------------------------------------------------

class Stored(NamedTuple):
    """params, held-out accuracy, and the sha256 that names the weights in a key."""
    params: dict
    accuracy: float
    sha256: str

    @property
    def key(self) -> str:
        return f"FD-cnn@{self.sha256[:8]}"


def flatten(params, prefix="") -> dict:
    """{'Conv_0/kernel': array, ...} of a nested dict."""
    out = {}
    for name, value in params.items():
        inner = f"{prefix}{name}"
        nested = isinstance(value, dict)
        out |= flatten(value, f"{inner}/") if nested else {inner: np.asarray(value)}
    return out


def unflatten(arrays) -> dict:
    out = {}
    for name, value in arrays.items():
        *path, leaf = name.split("/")
        at = out
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = value
    return out


def sha256(params) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(flatten(params).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def cache_folder(environ=None) -> str:
    environ = os.environ if environ is None else environ
    home = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "ddpm_jax")


def train_once(name: str, fingerprint: str, images, labels, *, folder=None, seed: int = 0,
               progress=None) -> Stored:
    """The stored classifier of this data, trained and stored on first use.

    fingerprint names the data (`Source.fingerprint`); folder defaults to the user's cache. Share
    the file between machines: retraining elsewhere gives other weights, hence another scale.
    """
    short = hashlib.sha256(fingerprint.encode()).hexdigest()[:8]
    path = files.join(folder or cache_folder(), f"cnn-{name}-{short}-{seed}.npz")
    if not files.exists(path):
        params, accuracy = train_classifier(images, labels, seed, progress=progress)
        files.write_npz(path, flatten(params) | {"accuracy": np.array(accuracy)})
    arrays = files.read_npz(path)
    accuracy = float(arrays.pop("accuracy"))
    params = unflatten(arrays)
    return Stored(params, accuracy, sha256(params))
