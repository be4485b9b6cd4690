"""Where a linear's input is measured."""

from __future__ import annotations

import pytest

from graphs.quantize.linears import site_of

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
