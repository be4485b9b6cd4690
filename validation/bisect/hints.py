"""Which pass made a node, so that its user knows where to look: as the fusion report and the manifest say, and not by guess."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from artifact.layout import MODULE_KEY

RULES = {
    "RMSNormalization": ("rms_norm",),
    "SimplifiedLayerNormalization": ("rms_norm",),
    "SkipSimplifiedLayerNormalization": ("skip_rms_norm",),
    "RotaryEmbedding": ("pack_rotated_qkv", "rotary"),
    "Attention": ("attention", "static_attention"),
    "GroupQueryAttention": ("group_query_attention", "grouped_static_attention"),
}
"""Operator → the fusions that write it."""
PACKING = {"qkv_proj": ("pack_qkv", "pack_rotated_qkv", "pack_grouped_qkv"), "gate_up_proj": ("pack_gate_up", "pack_sliced_gate_up")}
QUANTISED = ("DequantizeLinear", "QuantizeLinear", "MatMulNBits")


def made_by(node: ir.Node, stage: str, manifest: Mapping[str, Any]) -> str:
    """``fusion rms_norm (61 of 61 fired)``, ``the trace``, ``quantize --scheme int8``."""
    steps = manifest.get("steps", {})
    fused = next((steps[name].get("report") for name in ("fuse-onnxruntime", "fuse") if name in steps and _is_of(name, stage)), None) or {}
    fired = {rule["rule"]: rule for rule in fused.get("rules", ())}
    if node.op_type in QUANTISED:
        return f"quantize --scheme {stage.removesuffix('-onnxruntime')}"
    module = node.metadata_props.get(MODULE_KEY, "").rpartition(".")[2]
    for rule in (*RULES.get(node.op_type, ()), *PACKING.get(module, ())):
        if stage != "traced" and rule in fired and fired[rule]["fired"]:
            return f"fusion {rule} ({fired[rule]['fired']} of {fired[rule]['expected']} fired)"
    return "the trace (export)" if stage == "traced" else "the trace (export), or a step after it that left no record of this node"


def _is_of(step: str, stage: str) -> bool:
    return step.endswith("-onnxruntime") == stage.endswith("-onnxruntime")
