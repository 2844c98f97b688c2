import jax
import pytest

from ddpm_jax import experiment
from ddpm_jax.benchmark import peers
from ddpm_jax.config import load_config
from ddpm_jax.errors import UserError


def digits():
    """-> (config, schedule)"""
    config = load_config("digits")
    config.train.update(clip_replicas=1, batch_size=4)
    return config, experiment.build_model(config, jax.devices()[:1]).schedule


def test_unknown_peers_are_listed():
    with pytest.raises(UserError, match="'keras' is not known; known: diffusers"):
        peers.training("keras", *digits())


@pytest.mark.peer
@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_the_peer_is_the_same_network(name):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    config = load_config(name)
    config.train.clip_replicas = 1
    ours = experiment.build_model(config, jax.devices()[:1]).abstract_params
    theirs = peers.unet(config)
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        leaf.size for leaf in jax.tree.leaves(ours))
    config.model.space_to_depth = 2
    with pytest.raises(UserError, match="space_to_depth"):
        peers.unet(config)


@pytest.mark.peer
def test_the_peer_trains():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    run, steps = peers.training("diffusers", *digits())
    run()
    assert steps == peers.STEPS
