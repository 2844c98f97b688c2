import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.compilation import parts


def test_the_three_convolutions_of_a_layer_on_a_cpu():
    # 5 -> 7 channels: each convolution of the compiled program is recognised by what it makes.
    def loss(w, x):
        with jax.named_scope("UNet"), jax.named_scope("conv1"):
            y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME",
                                             dimension_numbers=("NHWC", "OHWI", "NHWC"))
        return jnp.sin(y).sum()

    args = jnp.ones((7, 3, 3, 5)), jnp.ones((2, 8, 8, 5))
    text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile().as_text()
    found = [parts.part(o) for kernel, o, _ in parts.origins(text).values()
             if kernel.kind == "convolution"]
    assert sorted(found) == ["convolution, filter gradient", "convolution, forward",
                             "convolution, input gradient"]


@pytest.mark.parametrize(("attributes", "part"), [
    ("dim_labels=b01f_01io->b01f, window={size=8x8 pad=1_1x1_1}", "filter gradient"),
    ("dim_labels=b01f_01io->b01f, window={size=3x3 pad=1_1x1_1}", "forward"),
    ("dim_labels=f01b_i01o->01bf, window={size=8x8 pad=1_1x1_1}, "
     'metadata={op_name="jit(f)/transpose(jvp(UNet))/c/conv"}', "filter gradient"),
    ("dim_labels=b01f_01io->b01f, window={size=8x8 pad=1_1x1_1}, "
     'metadata={op_name="jit(f)/transpose(jvp(UNet))/c/conv"}', "filter gradient"),
    ("dim_labels=b01f_01oi->b01f, window={size=3x3 pad=1_1x1_1}, "
     'metadata={op_name="jit(f)/transpose(jvp(UNet))/c/conv"}', "input gradient")])
def test_a_convolution_is_recognised_by_its_labels_or_its_window(attributes, part):
    text = f"""HloModule jit_f

ENTRY %main (a: f32[8,8,8,8], b: f32[8,8,8,8]) -> f32[8,4,4,8] {{
  %a = f32[8,8,8,8] parameter(0)
  %b = f32[8,8,8,8] parameter(1)
  ROOT %c = f32[8,4,4,8] convolution(%a, %b), {attributes}
}}
"""
    [(_, origin, _)] = parts.origins(text).values()
    assert parts.part(origin) == f"convolution, {part}"
