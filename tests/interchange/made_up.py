"""Untrained weights, chosen so that no layer's output vanishes or grows."""

import numpy as np

from ddpm_jax.interchange import parameter_names
from ddpm_jax.models.unet import UNet

SMALL = UNet(image_size=16, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,),
             dropout=0.0, num_groups=8)


def random_params(model, seed=0):
    """Nested params of ``model``: kernels N(0, 1/fan_in), scales 1 + N(0, 0.1^2), biases
    N(0, 0.1^2), all independent."""
    rng = np.random.default_rng(seed)
    params = {}
    for entry in parameter_names.entries(model):
        x = rng.standard_normal(entry.shape, dtype=np.float32)
        if len(entry.shape) > 1:
            fan_in = np.prod(entry.shape[1:]) if len(entry.shape) == 4 else entry.shape[0]
            x *= np.float32(fan_in**-0.5)
        else:
            x = np.float32(0.1) * x + np.float32(entry.path[-1] == "scale")
        node = params
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        node[entry.path[-1]] = x
    return params


def flat(tree, path=()):
    """{dotted path: leaf} of nested dicts."""
    if not isinstance(tree, dict):
        return {".".join(path): tree}
    return {k: v for key, child in tree.items() for k, v in flat(child, (*path, key)).items()}


def assert_bit_equal(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == np.float32 and a[name].shape == b[name].shape
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


def older_names(state_dict):
    """The same state dict under the attention names that diffusers used before 0.12."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    older = {}
    for key, value in state_dict.items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        older[key] = value
    return older


def small_config(**sections):
    """A config of SMALL's architecture with a chain of 50 steps; sections override fields."""
    from ddpm_jax.config import load_config

    config = load_config("default")
    config.data.update(name="folder", image_size=SMALL.image_size)
    config.model.update(ch=SMALL.ch, ch_mult=SMALL.ch_mult, dropout=0.0, num_groups=8,
                        num_res_blocks=SMALL.num_res_blocks,
                        attn_resolutions=SMALL.attn_resolutions)
    config.diffusion.num_timesteps = 50
    config.diffusion.schedule.beta_end = 0.2
    config.train.update(steps=10, batch_size=8, steps_per_dispatch=2, clip_scope="global")
    config.sampler.batch_size = 8
    for section, values in sections.items():
        config[section].update(values)
    return config


def restore(folder, config):
    """The newest training state of a run, as numpy arrays."""
    import jax

    from ddpm_jax import checkpoints, experiment

    exp = experiment.build_model(config, jax.devices()[:1])
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                        experiment.build_training(exp).abstract_state)
    store = checkpoints.Checkpoints(folder, read_only=True)
    try:
        return jax.tree.map(np.asarray, store.restore(store.find(None), like))
    finally:
        store.close()
