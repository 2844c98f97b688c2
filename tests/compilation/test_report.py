import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.compilation import report, topology
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import runners

SHAPE = jax.ShapeDtypeStruct


def two_convolutions(runner):
    """A training step small enough to compile anywhere, and its abstract arguments."""
    def loss(p, x):
        h = jax.lax.conv_general_dilated(
            x.astype(jnp.bfloat16), p["kernel"].astype(jnp.bfloat16), (1, 1), "SAME",
            dimension_numbers=("NHWC", "OHWI", "NHWC"))
        return jnp.mean(jnp.square(jax.nn.silu(h)).astype(jnp.float32))

    def step(p, x):
        value, grads = jax.value_and_grad(loss)(p, x)
        if runner.axis_name:
            grads, value = jax.lax.pmean((grads, value), runner.axis_name)
        return jax.tree.map(lambda a, b: a - 0.1 * b, p, grads), value

    jitted = runner.compile(step, ("replicated", "batch"), ("replicated", "replicated"),
                            donate=(0,))
    params = {"kernel": SHAPE((16, 3, 3, 3), jnp.float32)}
    images = SHAPE((16, 16, 16, 3), jnp.float32)
    return jitted, (runner.abstract("replicated", params), runner.abstract("batch", images))


@pytest.mark.parametrize("name", list(runners.RUNNERS))
def test_a_report_of_each_runner(name, tmp_path):
    runner = runners.RUNNERS[name](jax.devices()[:2])
    result = report.compile_and_report(*two_convolutions(runner), programs_cache=False)
    found = result.report
    assert set(found["seconds"]) == {"trace", "lower", "compile"}
    assert all(s["wall_s"] > 0 and s["cpu_s"] >= 0 for s in found["seconds"].values())
    assert found["jaxpr_equations"] > 10
    assert found["stablehlo"]["opcodes"]["stablehlo.convolution"] == 2
    # Weights in float32 and the loss: what must be summed over the two devices.
    reduced = found["hlo"]["collectives"]["all-reduce"]
    assert reduced["bytes"] in (4 * (16 * 27 + 1), 2 * 16 * 27 + 4)
    assert found["memory"]["argument"] == 4 * 16 * 27 + 4 * 8 * 16 * 16 * 3
    assert found["memory"]["peak"] > found["memory"]["argument"]
    # The convolution alone, forward and to its filter: 2 x 2 x 27 x 16 x 256 x 8 images a device.
    assert found["cost"]["flops"] > 2 * 2 * 27 * 16 * 256 * 8
    files = report.write_artifacts(result, tmp_path / "out")
    assert files == ["optimized_hlo.txt", "report.json", "stablehlo.mlir", "stablehlo.mlir.bc",
                     "unoptimized_hlo.pb", "unoptimized_hlo.txt"]
    assert json.loads((tmp_path / "out/report.json").read_text())["fingerprint"]
    assert (tmp_path / "out/unoptimized_hlo.txt").read_text().startswith("HloModule")
    assert (tmp_path / "out/stablehlo.mlir.bc").read_bytes()[:4] == b"ML\xefR"
    with pytest.raises(UserError, match="not an empty folder"):
        report.write_artifacts(result, tmp_path / "out")


def test_equations_inside_loops_and_branches_are_counted():
    def f(x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) * 2, x)

    outer = jax.make_jaxpr(f)(1.0).jaxpr
    inside = sum(len(e.params["jaxpr"].jaxpr.eqns) for e in outer.eqns if "jaxpr" in e.params)
    assert inside >= 2 and report.count_equations(outer) >= len(outer.eqns) + inside


def test_the_fingerprint_is_of_the_program():
    def lowered(f):
        return jax.jit(f).lower(np.ones(3, np.float32)).as_text()

    assert report.fingerprint(lowered(lambda x: x + 1)) == report.fingerprint(
        lowered(lambda x: x + 1))
    assert report.fingerprint(lowered(lambda x: x + 1)) != report.fingerprint(
        lowered(lambda x: x + 2))


def test_nonsense_of_a_cost_model_is_not_reported():
    assert report.sensible(-35.0) is None and report.sensible(float("nan")) is None
    assert report.sensible(float("inf")) is None and report.sensible(0.0) is None
    assert report.sensible(0.0, zero=True) == 0.0 and report.sensible(2) == 2.0

    class Odd:
        def cost_analysis(self):
            return {"flops": 3.0, "optimal_seconds": -6.0}

    assert report.cost(Odd()) == {"status": "estimated", "flops": 3.0, "bytes": None,
                                  "transcendentals": None, "optimal_seconds": None}


def test_compiler_options():
    assert report.compiler_options("O0", ["a=1", "b=true", "c=fast"]) == {
        "optimization_level": 9, "a": 1, "b": True, "c": "fast"}
    with pytest.raises(UserError, match="'O9' is not one of O0, O1"):
        report.compiler_options("O9")
    with pytest.raises(UserError, match="key=value"):
        report.compiler_options(None, ["xla_dump_to"])
    jitted, args = two_convolutions(runners.jit_runner(jax.devices()[:1]))
    with pytest.raises(UserError, match="xla_no_such_thing"):
        report.compile_and_report(jitted, args, options={"xla_no_such_thing": True})


@pytest.mark.peer
@pytest.mark.parametrize(("name", "reduces"), [("v3-8", 2), ("v5litepod-8", 2)])
def test_absent_tpus_compile_and_sum_in_two_collectives(name, reduces):
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    machine = topology.describe(name)
    jitted, args = two_convolutions(runners.jit_runner(machine.devices))
    result = report.compile_and_report(
        jitted, args, options=report.compiler_options("O0"), programs_cache=False)
    found = result.report
    assert found["hlo"]["collectives"]["all-reduce"]["count"] == reduces
    assert found["cost"]["flops"] > 0 and found["cost"]["bytes"] > 0
    assert found["memory"]["generated_code"] > 0
    with pytest.raises(UserError, match="xla_no_such_thing"):
        report.compile_and_report(jitted, args, options={"xla_no_such_thing": True})


@pytest.mark.peer
def test_a_program_that_does_not_fit_is_reported_not_raised():
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    runner = runners.jit_runner(topology.describe("v5litepod-1").devices)
    big = runner.abstract("replicated", SHAPE((4 << 30, 2), jnp.float32))
    jitted = runner.compile(lambda x: x * 2, ("replicated",), ("replicated",))
    result = report.compile_and_report(jitted, (big,), programs_cache=False)
    assert result.compiled is None and result.report["fits"] is False
    assert "memory" in result.report["why"]


@pytest.mark.peer
def test_an_absent_h100_compiles():
    pytest.importorskip("jax_plugins.xla_cuda12", reason="the CUDA plugin is not installed")
    machine = topology.describe("h100:2")
    result = report.compile_and_report(*two_convolutions(runners.jit_runner(machine.devices)),
                                       programs_cache=False)
    found = result.report["hlo"]
    assert any("conv" in target for target in found["custom_calls"])
    assert found["by_class"]["convolution"]["kernels"] == 2
    assert found["collectives"]["all-reduce"]["count"] == 2
    assert result.report["cost"]["flops"] is None  # this backend has no cost model ahead of time
