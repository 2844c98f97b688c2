import json

import jax
import pytest
from tiny_run import digits

from ddpm_jax import experiment
from ddpm_jax.benchmark import compiled
from ddpm_jax.compilation import report
from ddpm_jax.compilation.roofline import unet_work
from ddpm_jax.config import load_config
from ddpm_jax.errors import UserError


def tiny(**changes):
    config = digits()
    config.model.update(ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4, attn_resolutions=())
    config.diffusion.num_timesteps = 4
    config.train.update(batch_size=16, steps_per_dispatch=1, clip_scope="per_replica",
                        clip_replicas=8)
    config.sampler.batch_size = 16
    config.ema.decay = 0.999
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("program", list(compiled.PROGRAMS))
def test_every_program_traces_and_counts_its_work(program):
    exp = experiment.build_model(tiny(), jax.devices()[:2])
    made = compiled.PROGRAMS[program](exp, 100)
    made.jitted.lower(*made.args)
    assert made.images == 16 and made.calls >= 1 and made.flops > 0


def test_hand_counted_work_is_what_the_network_has():
    for name in ("cifar10", "celebahq256", "digits"):
        config = load_config(name)
        config.train.clip_replicas = config.train.batch_size = 1
        exp = experiment.build_model(config, jax.devices()[:1])
        parameters = sum(p.size for p in jax.tree.leaves(exp.abstract_params))
        assert unet_work(exp.model).parameters == parameters, name


def test_hand_counted_flops_agree_with_xla():
    # XLA leaves out products with the padding (2 % at 64 pixels) and adds norms and activations.
    config = digits()
    config.data.update(name="folder", image_size=64)
    config.model.update(num_groups=32, ch=64, attn_resolutions=(32,))
    exp = experiment.build_model(config, jax.devices()[:1])
    denoise = jax.jit(lambda p, x, t: exp.model.apply({"params": p}, x, t))
    x = jax.ShapeDtypeStruct((4, *exp.image_shape), "float32")
    t = jax.ShapeDtypeStruct((4,), "int32")
    lowered = denoise.lower(exp.abstract_params, x, t)
    counted = 4 * unet_work(exp.model).forward_flops
    assert 0.97 * counted < lowered.cost_analysis()["flops"] < 1.1 * counted


@pytest.mark.slow
def test_a_report_from_a_config():
    config = tiny(**{"model.ch_mult": (1,), "train.clip_replicas": 2, "train.random": "unsafe_rbg"})
    result = compiled.measure(config, topology="cpu:2", program="train_step", name="tiny",
                             options=report.compiler_options("O0"), num_examples=64)
    found = result.report
    assert found["about"]["step"] == {
        "dropout": "0.05", "clip": "1.0 per_replica", "EMA": "0.999",
        "optimizer": "Adam, eps as tensorflow", "random": "unsafe_rbg"}
    gradients = 4 * found["work"]["parameters"]
    assert found["hlo"]["collectives"]["all-reduce"]["bytes"] == pytest.approx(gradients, rel=0.01)
    text = report.render(found)
    assert "dropout 0.05" in text and "[estimated]" in text and "all-reduce" in text
    assert "fit" not in found and "roofline" not in found  # a CPU is not in the table of chips
    json.dumps(found)


def test_what_a_step_lacks_is_called_absent():
    config = tiny(**{"model.dropout": 0.0, "train.clip_norm": 0.0})
    parts = compiled.step_parts(config)
    assert parts["dropout"] == parts["clip"] == "absent" != parts["EMA"] and "state" not in parts
    parts = compiled.step_parts(tiny(**{"parallel.shards": 2, "parallel.cut": "params"}))
    assert parts["state"] == "params cut over 2"


def test_bad_input():
    with pytest.raises(UserError, match="program: 'x' is not known; known: train_step"):
        compiled.measure(tiny(), topology="cpu:8", program="x", options={}, num_examples=1)
    with pytest.raises(UserError, match="v5litepod-8"):
        compiled.measure(tiny(), topology="v12-8", program="sample", options={}, num_examples=1)
    with pytest.raises(UserError, match="sampler.batch_size=12 is not divisible by the 8 devices"):
        compiled.measure(tiny(**{"sampler.batch_size": 12}), topology="cpu:8", program="sample",
                        options={}, num_examples=1)
    with pytest.raises(UserError, match="runner.*shard_map"):
        compiled.measure(tiny(**{"parallel.runner": "x"}), topology="cpu:8", program="sample",
                        options={}, num_examples=1)


@pytest.mark.peer
@pytest.mark.parametrize("topology, one", [("h100:16", 8), ("h100:4*2", 4)])
def test_a_state_is_not_cut_over_hosts_of_absent_gpus(topology, one):
    pytest.importorskip("jax_plugins.xla_cuda12", reason="the CUDA plugin is not installed")
    config = tiny(**{"parallel.runner": "jit", "parallel.shards": 2 * one})
    for program in compiled.TRAINING:
        with pytest.raises(UserError, match=f"shards={2 * one} does not divide the {one} devices of"
                                            f" one slice, or host of GPUs; take .*, {one}$"):
            compiled.measure(config, topology=topology, program=program, options={},
                             num_examples=64)


@pytest.mark.peer
@pytest.mark.parametrize(("topology", "most"), [("v3-8", 2), ("v5litepod-8", 2)])
def test_a_training_step_for_absent_tpus_sums_in_two_collectives(topology, most):
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    config = tiny(**{"model.ch_mult": (1,)})
    result = compiled.measure(config, topology=topology, program="train_step", num_examples=64,
                             options=report.compiler_options("O0"))
    found = result.report
    assert 1 <= found["hlo"]["collectives"]["all-reduce"]["count"] <= most
    assert found["fit"]["fits"] and found["fit"]["free"] > 0.9
    assert found["roofline"]["status"] == "estimated" and len(found["speed"]) == 4
    assert "at_measured_rates" not in found  # no TPU's are known
    assert "chip-hours" in report.render(found)
