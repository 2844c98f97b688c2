import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.compilation import parts, profiles
from ddpm_jax.errors import UserError

# Kernels of a training step on an H100 (cifar10, batch 128, global clip, CUDA graphs off, commit
# 84ae50c): microseconds a step, launches, instruction, op_name after 'jit(program)/', result.
BACK, FORTH = "transpose(jvp(UNet))", "jvp(UNet)"
MAP = "bf16[128,32,32,128]"
TIMED = [
    (66.51, 1, "cudnn-conv.41", f"{FORTH}/up_0_block_1/conv2/conv2.without_bias/"
     "conv_general_dilated", MAP, "convolution, forward"),
    (195.34, 2, "cudnn-conv-bw-input.7", f"{BACK}/up_1_upsample/up_1_upsample.without_bias/"
     "conv_general_dilated", MAP, "convolution, input gradient"),
    (213.16, 2, "cudnn-conv-bw-filter.33", f"{BACK}/up_1_upsample/up_1_upsample.without_bias/"
     "conv_general_dilated", "bf16[256,3,3,256]", "convolution, filter gradient"),
    (257.09, 1, "input_reduce_fusion.213", f"{BACK}/up_0_block_0/norm1/reduce_sum",
     "(f32[128,32,128], f32[128,32,128])", "norm sums, backward"),
    (139.70, 1, "loop_add_fusion.10", f"{BACK}/up_0_block_0/norm1/add_any", MAP,
     "norm apply, backward"),
    (14.05, 1, "input_reduce_fusion.9", f"{FORTH}/down_0_block_1/norm2/reduce_sum",
     "f32[128,32,128]", "norm sums, forward"),
    (1.29, 1, "loop_rsqrt_fusion.3", f"{FORTH}/mid_attn/norm/rsqrt", "f32[128,32]",
     "norm sums, forward"),
    (30.54, 1, "loop_convert_fusion.52", f"{FORTH}/down_0_block_1/norm2/convert_element_type",
     MAP, "norm apply, forward"),
    (20.30, 1, "gemm_fusion_dot_general.2", f"{BACK}/up_1_attn_2/bqc,bkc->bqk/dot_general",
     "bf16[128,256,256]", "attention, backward"),
    (10.12, 1, "loop_add_fusion.2", f"{FORTH}/mid_attn/q/add", "bf16[128,16,256]",
     "attention, forward"),
    (51.21, 1, "custom-call.206", f"{BACK}/up_0_block_0/shortcut/transpose",
     "f32[64,384,128]", "1x1 shortcuts"),
    (265.68, 1, "loop_compare_fusion", f"{FORTH}/up_0_block_1/norm2/ge",
     "pred[128,32,32,128]", "random bits"),
    (195.91, 1, "loop_concatenate_fusion.1", "sub", "f32[29,256,3,3,256]",
     "optimizer, clip, average, data, sampler"),
    (80.40, 1, "wrapped_concatenate", f"{FORTH}/concatenate", "bf16[128,32,32,384]",
     "skip concatenations"),
    (7.10, 1, "input_reduce_fusion.1", f"{BACK}/up_3_block_2/conv2/reduce_sum",
     "bf16[64,256]", "bias gradients"),
    (41.40, 1, "loop_broadcast_fusion", f"{FORTH}/broadcast_in_dim",
     "bf16[128,16,2,16,2,256]", "rest")]
TARGETS = {"cudnn-conv.": "__cudnn$convForward", "cudnn-conv-bw-input": "__cudnn$convBackwardInput",
           "cudnn-conv-bw-filter": "__cudnn$convBackwardFilter", "custom-call": "__cublas$gemm"}


def program():
    """The kernels above as XLA prints a program; the masks' fusion holds threefry."""
    lines = ["HloModule jit_program, is_scheduled=true", "",
             "%fused_compare (p: bf16[128,32,32,128]) -> pred[128,32,32,128] {",
             f"  %p = {MAP} parameter(0)",
             "  ROOT %x = pred[128,32,32,128] xor(%p, %p), metadata={op_name=\"jit(program)/"
             "jvp(UNet)/up_0_block_1/vmap(jit(_threefry_split))/xor\"}", "}", "",
             f"ENTRY %main (in: {MAP}) -> f32[] {{", f"  %in = {MAP} parameter(0)"]
    for _, _, name, op_name, result, _ in TIMED:
        target = next((t for start, t in TARGETS.items() if name.startswith(start)), None)
        call = (f'custom-call(%in, %in), custom_call_target="{target}"' if target else
                "fusion(%in), kind=kLoop, calls=%fused_compare" if "compare" in name else
                "negate(%in)")
        lines.append(f'  %{name} = {result} {call}, metadata={{op_name="jit(program)/{op_name}"}}')
    return "\n".join([*lines, "}"])


def write_trace(folder, lines):
    """An XSpace with a GPU's plane, {line: [(name, hlo_op or None, microseconds)]}, as jax.profiler
    writes it: events of a line one after the other, statistics by number."""
    names, text = {}, []
    for line, events in lines.items():
        at, made = 0, []
        for name, op, us in events:
            stat = f'stats {{ metadata_id: 1 str_value: "{op}" }}' if op else ""
            module = 'stats { metadata_id: 2 str_value: "jit_program" }' if op else ""
            made.append(f"events {{ metadata_id: {names.setdefault(name, len(names) + 1)} "
                        f"offset_ps: {at} duration_ps: {round(us * 1e6)} {stat} {module} }}")
            at += round(us * 1e6)
        text.append(f'lines {{ name: "{line}" {" ".join(made)} }}')
    text += [f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
             for name, i in names.items()]
    text += [f'stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
             for i, name in ((1, "hlo_op"), (2, "hlo_module"))]
    space = f'planes {{ name: "/device:GPU:0" {" ".join(text)} }}'
    folder.mkdir(exist_ok=True)
    (folder / "host.xplane.pb").write_bytes(
        jax.profiler.ProfileData.text_proto_to_serialized_xspace(space))


def trace(folder, steps=3):
    """Steps of TIMED on two streams, each step ended by a copy; and the lines that the profiler
    derives, which count everything again."""
    ran = [(f"sm90_{name}", name, us / launches) for us, launches, name, *_ in TIMED
           for _ in range(launches)]
    write_trace(folder, {
        "Stream #13(Compute)": ran * steps,
        "Stream #14(MemcpyD2H)": [("MemcpyD2H", "while.3", 0.8)],
        "XLA Ops": [(name, name, us) for us, _, name, *_ in TIMED] * steps,
        "XLA Modules": [("jit_program", None, 1589.8)] * steps, "Framework Ops": ran * steps})


@pytest.mark.filterwarnings("ignore:builtin type")  # of JAX 0.12's own binding
def test_a_gpus_streams_add_up_to_the_step(tmp_path):
    trace(tmp_path / "t")
    found = profiles.table(tmp_path / "t", program(), platform="gpu", steps=3)
    step = sum(row[0] for row in TIMED) * 1e-6
    assert found["seconds"] == pytest.approx(step + 0.8e-6 / 3)
    expected = {}
    for us, launches, *_, part in TIMED:
        row = expected.setdefault(part, [0.0, 0])
        row[0] += us * 1e-6
        row[1] += launches
    copies = found["parts"].pop(profiles.UNKNOWN)
    assert copies["seconds"] == pytest.approx(0.8e-6 / 3)
    for part, (seconds, launches) in expected.items():
        row = found["parts"].pop(part)
        assert (row["seconds"], row["launches"]) == pytest.approx((seconds, launches)), part
    kernels = {"norm kernels, forward", "norm kernels, backward"}  # of parallel.norm_kernel=triton
    assert not found["parts"]
    assert set(expected) | {"collectives"} | kernels == set(parts.PARTS)
    sums = found["by_class"]["reduction to several sums"]
    assert sums["bytes"] == 128 * 32 * 32 * 128 * 2 + 2 * 128 * 32 * 128 * 4
    dearest = found["kernels"][0]
    assert dearest["name"] == "loop_compare_fusion" and dearest["bytes_per_s"] == pytest.approx(
        128 * 32 * 32 * 128 * 3 / 265.68e-6)
    assert len(profiles.check(found, step)) == 1
    text = profiles.render(found)
    assert "input_reduce_fusion.213 (norm sums, backward)" in text

    # Half of the step missing, as when CUDA graphs launch it, or all of it twice.
    for factor in (2.0, 0.5):
        [_, warning] = profiles.check(found, factor * step)
        assert warning.startswith(f"WARNING: profile: the kernels are {1 / factor:.0%} of the")


@pytest.mark.filterwarnings("ignore:builtin type")
def test_kernels_that_the_text_does_not_name_are_counted_and_warned_of(tmp_path):
    trace(tmp_path / "t")
    other = program().replace("jit_program", "jit_other")
    found = profiles.table(tmp_path / "t", other, platform="gpu", steps=3)
    assert list(found["parts"]) == [profiles.UNKNOWN]
    [_, warning] = profiles.check(found, found["seconds"])
    assert "100% of the time is of kernels that the program's text does not name" in warning


@pytest.mark.filterwarnings("ignore:builtin type")
def test_the_trace_of_a_cpu_counts_a_loop_by_what_runs_in_it(tmp_path):
    @jax.jit
    def f(w, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    w = x = jnp.ones((256, 256))
    text = f.lower(w, x).compile().as_text()
    f(w, x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        f(w, x).block_until_ready()
    found = profiles.table(tmp_path, text, platform="cpu", steps=5, steps_in_text=5)
    [product] = [k for k in found["kernels"] if k["class"] == "matrix product"]
    assert product["launches"] == 1 and product["bytes"] == 3 * 256 * 256 * 4
    assert not any(k["name"].startswith("while") for k in found["kernels"])
    assert 0 < found["busy_s"] <= found["seconds"] * 1.001
    with pytest.raises(UserError, match=r"the trace in .* has no kernels of a GPU; on a GPU the"):
        profiles.table(tmp_path, text, platform="gpu", steps=5)
