import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.compilation import hlo

# Written by hand in the form XLA prints, so that every figure below can be counted with a pencil.
PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_multiply (p0: bf16[4,8], p1: bf16[4,8]) -> bf16[4,8] {
  %p0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[4,8]{1,0} parameter(1)
  ROOT %m = bf16[4,8]{1,0} multiply(%p0, %p1), metadata={op_name="jit(step)/mul"}
}

%fused_slice (p0: f32[100], p1: f32[10]) -> f32[10] {
  %p0 = f32[100]{0} parameter(0)
  %p1 = f32[10]{0} parameter(1)
  %s = f32[10]{0} slice(%p0), slice={[0:10]}
  ROOT %r = f32[10]{0} add(%s, %p1)
}

%fused_outer (p0: f32[10], p1: f32[100]) -> f32[10] {
  %p0 = f32[10]{0} parameter(0)
  %p1 = f32[100]{0} parameter(1)
  %inner = f32[10]{0} fusion(%p1, %p0), kind=kLoop, calls=%fused_slice
  ROOT %n = f32[10]{0} negate(%inner)
}

%handed_on (p0: f32[100]) -> f32[10,10] {
  %p0 = f32[100]{0} parameter(0)
  ROOT %b = f32[10,10]{1,0} bitcast(%p0)
}

%fused_handed_on (p0: f32[100]) -> f32[10,10] {
  %p0 = f32[100]{0} parameter(0)
  %inner.1 = f32[10,10]{1,0} fusion(%p0), kind=kLoop, calls=%handed_on
  ROOT %n.1 = f32[10,10]{1,0} negate(%inner.1)
}

%fused_update (p0: f32[100], p1: f32[10], p2: s32[]) -> f32[100] {
  %p0 = f32[100]{0} parameter(0)
  %p1 = f32[10]{0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %u = f32[100]{0} dynamic-update-slice(%p0, %p1, %p2)
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %reduced = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%add.1
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, %reduced)
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  %arg.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (in: f32[8], w: bf16[4,8], big: f32[100], small: f32[10]) -> f32[8] {
  %in = f32[8]{0} parameter(0)
  %w = bf16[4,8]{1,0} parameter(1)
  %big = f32[100]{0} parameter(2)
  %small = f32[10]{0} parameter(3)
  %zero = s32[] constant(0)
  %loop_multiply_fusion.7 = bf16[4,8]{1,0} fusion(%w, %w), kind=kLoop, calls=%fused_multiply
  %loop_slice_fusion = f32[10]{0} fusion(%big, %small), kind=kLoop, calls=%fused_slice
  %loop_negate_fusion = f32[10]{0} fusion(%small, %big), kind=kLoop, calls=%fused_outer
  %loop_update_fusion = f32[100]{0} fusion(%big, %loop_slice_fusion, %zero), kind=kLoop, calls=%fused_update
  %loop_handed_on_fusion = f32[10,10]{1,0} fusion(%big), kind=kLoop, calls=%fused_handed_on
  %conv = (bf16[4,8]{1,0}, u8[16]{0}) custom-call(%loop_multiply_fusion.7), custom_call_target="__cudnn$convForward"
  %start = (s32[], f32[8]{0}) tuple(%zero, %in)
  %while.1 = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_counts_of_a_program_written_by_hand():
    found = hlo.summary(PROGRAM)
    assert found["instructions"] == 3 + 3 + 4 + 4 + 2 + 3 + 4 + 5 + 4 + 14
    assert found["entry_instructions"] == 14
    assert found["opcodes"]["fusion"] == 7 and found["fusions"] == 5
    assert found["loops"] == [{"name": "while.1", "trips": 5}]
    # The loop's all-reduce runs five times; constants, tuples and parameters launch nothing.
    assert found["collectives"] == {"all-reduce": {"count": 5, "bytes": 5 * 32}}
    assert found["kernels"] == 5 + 1 + 5
    multiply, sliced, update = 3 * 64, 400 + 40 + 40, 400 + 40 + 4 + 400
    handed_on = 400 + 400
    assert found["bytes"] == (multiply + 2 * sliced + handed_on + update
                              + (64 + 64 + 16) + 5 * 64)
    assert found["bytes_sliced"] == (multiply + 2 * 3 * 40 + handed_on + (40 + 40 + 4)
                                     + (64 + 64 + 16) + 5 * 64)
    assert found["custom_calls"] == {"__cudnn$convForward": 1}
    assert found["by_class"]["convolution"] == {"kernels": 1, "bytes": 144, "bytes_sliced": 144}
    assert found["by_class"]["collective"]["kernels"] == 5
    assert found["by_name"]["loop_multiply"]["bytes"] == multiply


def test_flops_of_cudnns_convolutions():
    # 3x3, 3 -> 8 channels, 2 images, 16x16 -> 8x8 pixels with stride 2: the same for all three.
    work = 2 * 9 * 3 * 8 * 2 * 64
    x, y, w = "bf16[2,16,16,3]", "bf16[2,8,8,8]", "bf16[8,3,3,3]"
    for kind, first, second, result in (("Forward", x, w, y), ("BackwardInput", y, w, x),
                                        ("BackwardFilter", x, y, w)):
        text = f"""HloModule jit_f

ENTRY %main (a: {first}, b: {second}) -> {result} {{
  %a = {first} parameter(0)
  %b = {second} parameter(1)
  ROOT %c = ({result}, u8[0]) custom-call(%a, %b), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{kind}"
}}
"""  # noqa: E501
        assert hlo.summary(text)["by_class"]["convolution"]["flops"] == work


def test_a_reduce_scatter_of_a_tpu_is_a_fusion():
    """As libtpu writes it: the sum and the cut are one kernel, whose operand is the whole array."""
    found = hlo.summary("""HloModule jit_f

%all-reduce-scatter.10 (input: bf16[256,8]) -> bf16[32,8] {
  %input = bf16[256,8]{1,0} parameter(0)
  %part = u32[] partition-id()
  %all-reduce.80 = bf16[256,8]{1,0} all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %cut = bf16[32,8]{1,0} dynamic-slice(%all-reduce.80, %part, %zero), dynamic_slice_sizes={32,8}
}

ENTRY %main (g: bf16[256,8]) -> bf16[32,8] {
  %g = bf16[256,8]{1,0} parameter(0)
  ROOT %fusion.1009 = bf16[32,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.10
}
""")  # noqa: E501
    assert found["collectives"]["reduce-scatter"] == {"count": 1, "bytes": 256 * 8 * 2}
    assert found["by_class"]["collective"]["kernels"] == 1


def test_an_unknown_trip_count_counts_once_and_says_so():
    found = hlo.summary(PROGRAM.replace("direction=LT", "direction=NE"))
    assert found["loops"] == [{"name": "while.1", "trips": None}]
    assert found["collectives"]["all-reduce"]["count"] == 1
    told = PROGRAM.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert hlo.summary(told)["collectives"]["all-reduce"]["count"] == 9


@pytest.mark.parametrize(("type", "size"), [
    ("f32[8,32]{1,0:T(8,128)}", 1024), ("bf16[3]", 6), ("pred[7]", 7), ("s32[]", 4), ("token[]", 0),
    ("(f32[2]{0}, u8[5]{0}, (bf16[2,2]))", 21), ("s4[5]", 3), ("f8e4m3fn[4]", 4), ("f32[0]", 0)])
def test_bytes_of_types(type, size):
    assert hlo.array_bytes(type) == size


def test_what_xla_prints_today_is_read():
    # 7 steps of x @ w: the loop, its trip count and its product must all be found.
    def f(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), x.sum()), x, None, length=7)

    lowered = jax.jit(f).lower(jnp.ones((64, 64)), jnp.ones((64, 64)))
    found = hlo.summary(lowered.compile().as_text())
    assert [loop["trips"] for loop in found["loops"]] == [7]
    assert found["by_class"]["matrix product"]["kernels"] == 7
    ops = hlo.stablehlo_opcodes(lowered.as_text())
    assert ops["stablehlo.while"] == 1 and ops["stablehlo.dot_general"] == 1
    assert "func.func" not in ops and "stablehlo.return" not in ops


def test_the_fingerprint_is_of_the_program_and_not_of_its_names():
    text = """HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/f.py"

ENTRY %main.1 (x.2: f32[4]) -> f32[4] {
  %x.2 = f32[4]{0} parameter(0), metadata={op_name="x{0}"}
  ROOT %add.3 = f32[4]{0} add(%x.2, %x.2), metadata={op_name="f" source_line=3}, stack_frame_id=4
}
"""
    other = text.replace("jit_f", "jit_g").replace("%x.2", "%y.9").replace("add.3", "add.12")
    other = other.replace("somewhere", "elsewhere").replace("source_line=3", "source_line=4")
    assert hlo.fingerprint(text) == hlo.fingerprint(other.replace("stack_frame_id=4",
                                                                  "stack_frame_id=5"))
    assert "metadata" not in hlo.normalised(text) and "f.py" not in hlo.normalised(text)
    assert hlo.fingerprint(text) != hlo.fingerprint(text.replace(" add(", " multiply("))
    assert hlo.fingerprint(text) != hlo.fingerprint(text.replace("%x.2, %x.2)", "%x.2, %z.1)"))
