"""Where a linear's input is measured."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphs.quantize.linears import bias_of, find_linears, site_of

LAYER = "model.layers.3."


@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("self_attn.q_proj", "self_attn.qkv_proj"),
        ("self_attn.v_proj", "self_attn.qkv_proj"),
        ("self_attn.qkv_proj", "self_attn.qkv_proj"),
        ("self_attn.o_proj", "self_attn.o_proj"),
        ("mlp.up_proj", "mlp.gate_up_proj"),
        ("mlp.gate_up_proj", "mlp.gate_up_proj"),
        ("mlp.down_proj", "mlp.down_proj"),
    ],
)
def test_site_is_that_of_the_packed_projection(module: str, site: str) -> None:
    assert site_of(LAYER + module) == LAYER + site


def test_site_of_what_is_in_no_layer_is_itself() -> None:
    assert site_of("lm_head") == "lm_head"


CASTS = {
    "": "y = MatMul(x, t)\n z = Add({operands})",
    "cast": "m = MatMul(x, t)\n y = Cast<to=10>(m)\n z = Add({operands})",
}


@pytest.mark.parametrize("form", CASTS)
@pytest.mark.parametrize("operands", ["y, b", "b, y"])
def test_a_bias_is_what_is_added_whatever_its_name(form: str, operands: str) -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float16[1, 3] x) => (float16[1, 2] z) <float16[2, 3] w = {{0, 0, 0, 0, 0, 0}}, float16[2] b = {{1, 2}}> {{
          t = Transpose<perm=[1, 0]>(w)
          {CASTS[form].format(operands=operands)}
        }}"""
    )
    (linear,) = find_linears(model.graph)
    assert bias_of(linear) is model.graph.initializers["b"]


@pytest.mark.parametrize("behind", ["z = Add(y, r)", "z = Relu(y)"])
def test_a_residual_or_nothing_is_no_bias(behind: str) -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[1, 3] x, float[1, 2] r) => (float[1, 2] z) <float[2, 3] w = {{0, 0, 0, 0, 0, 0}}> {{
          t = Transpose<perm=[1, 0]>(w)
          y = MatMul(x, t)
          {behind}
        }}"""
    )
    (linear,) = find_linears(model.graph)
    assert bias_of(linear) is None
