import jax
import pytest

from ddpm_jax.compilation import topology
from ddpm_jax.errors import UserError


def test_cpu_devices():
    described = topology.describe("cpu:8")
    assert described.devices == jax.devices("cpu")[:8]
    assert described.chip is None and described.chips == 8
    assert len(topology.describe("cpu").devices) == 1
    with pytest.raises(UserError, match="asks for 9 CPU devices.*device_count=9"):
        topology.describe("cpu:9")


@pytest.mark.parametrize("name", ["v9-8", "v3-8-8", "", "v5e", "h100:2x2", "cpu:2x4", "h100:12",
                                  "v3-5", "v3:1x1x1", "b200:8", "v5e-2x4", "cpu:0", "v5e-8*0",
                                  "cpu:2*2", "v5e:x4"])
def test_unknown_names_list_what_exists(name):
    with pytest.raises(UserError, match="v5litepod-8.*v5p:4x4x4.*h100:8.*cpu:8"):
        topology.describe(name)


@pytest.mark.parametrize(("name", "module", "command"), [
    ("v3-8", "libtpu", r'pip install "jax\[tpu\]=='),
    ("h100:8", "xla_cuda12", "pip install --no-deps jax-cuda12-plugin==.* jax-cuda12-pjrt==")])
def test_an_absent_compiler_names_the_command(name, module, command, monkeypatch):
    find = topology.importlib.util.find_spec
    monkeypatch.setattr(topology.importlib.util, "find_spec",
                        lambda m: None if module in m else find(m))
    with pytest.raises(UserError, match=command):
        topology.describe(name)


@pytest.mark.peer
def test_real_topologies():
    # name -> JAX devices, chips, hosts, device kind: what Google calls these machines.
    expected = {
        "v2-8": (8, 4, 1, "TPU v2"), "v3-8": (8, 4, 1, "TPU v3"), "v3:2x2": (8, 4, 1, "TPU v3"),
        "v3-32": (32, 16, 4, "TPU v3"), "v4-8": (4, 4, 1, "TPU v4"), "v4-32": (16, 16, 4, "TPU v4"),
        "v5litepod-1": (1, 1, 1, "TPU v5 lite"), "v5litepod-8": (8, 8, 1, "TPU v5 lite"),
        "v5e-256": (256, 256, 64, "TPU v5 lite"), "v5e:16x16": (256, 256, 64, "TPU v5 lite"),
        "v5p:4x4x4": (64, 64, 16, "TPU v5"), "v5p-8": (4, 4, 1, "TPU v5"),
        "v6e-8": (8, 8, 1, "TPU v6 lite"), "v7x-8": (8, 4, 1, "TPU7x"),
    }
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    for name, (devices, chips, hosts, kind) in expected.items():
        described = topology.describe(name)
        assert len(described.devices) == devices, name
        assert described.chips == chips, name
        assert len({d.process_index for d in described.devices}) == hosts, name
        assert described.devices[0].device_kind == kind in described.chip.device_kinds
    two = topology.describe("v5e-8*2")
    assert two.slices == 2 and {d.slice_index for d in two.devices} == {0, 1}
    with pytest.raises(UserError, match="unknown to the compiler.*known forms"):
        topology.describe("v5e:3x5")


@pytest.mark.peer
def test_the_shipped_gpu_target():
    pytest.importorskip("jax_plugins.xla_cuda12", reason="the CUDA plugin is not installed")
    eight = topology.describe("h100:8")
    assert len(eight.devices) == eight.chips == 8 and eight.slices == 1
    assert eight.devices[0].device_kind in eight.chip.device_kinds
    pod = topology.describe("h100:32")
    assert (len(pod.devices), pod.slices) == (32, 4)
