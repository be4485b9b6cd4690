"""A tiny fused Llama as the fusions make it, with unique random weights in external data, and real plans of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifact.config import LlamaConfig
from artifact.io_spec import OPSETS, KvCache, graph_inputs, graph_outputs
from artifact.layout import MODULE_KEY
from artifact.progress import silent
from engines.backends.protocol import BuildRequest
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.engine_graph import write_engine_graph
from engines.profiles import make_profiles
from engines.targets import find_target
from graphs.fusions import accumulate
from graphs.fusions._reading import apply_reader
from graphs.quantize.islands import Islands
from graphs.quantize.linears import find_linears

E, F, H, K, D, V, POSITIONS = 256, 384, 4, 2, 64, 512, 256  # fewer than 4 heads: TensorRT-RTX has no fused attention kernel
HEAD = """
embedded = Gather(embed, input_ids)
sizes = Shape(attention_mask)
total = Gather(sizes, one)
new_size = Shape<start = 1, end = 2>(input_ids)
new = Squeeze(new_size)
past = Sub(total, new)
slots = Range(zero, total, one)
rows = Range(past, total, one)
rows_column = Unsqueeze(rows, axis1)
causal = LessOrEqual(slots, rows_column)
diagonal = Equal(slots, rows_column)
real = Cast<to = 9>(attention_mask)
real_4d = Unsqueeze(real, axes12)
visible = And(causal, real_4d)
mask = Or(visible, diagonal)
"""
NEW_AXIS = """
L_gate_up4 = Reshape(L_gate_up, gate_up_shape)
L_gate4, L_up4 = Split<axis = 2>(L_gate_up4, halves)
L_gate = Squeeze(L_gate4, axis2)
L_up = Squeeze(L_up4, axis2)
"""
LAST_AXIS = """
L_gate, L_up = Split<axis = 2>(L_gate_up, widths)
"""
QUERY_APART = """
L_q4, L_kv4 = Split<axis = 2>(L_qkv4, query_parts)
L_q = Transpose<perm = [0, 2, 1, 3]>(L_q4)
L_kv = Transpose<perm = [0, 2, 1, 3]>(L_kv4)
L_k, L_v = Split<axis = 1>(L_kv, cache_parts)"""
ALL_TURNED = """
L_heads = Transpose<perm = [0, 2, 1, 3]>(L_qkv4)
L_q, L_k, L_v = Split<axis = 1>(L_heads, qkv_parts)"""
SCALED = "L_q_scaled = Mul(L_q_rotated, q_scale)"
NOT_SCALED = "L_q_scaled = Identity(L_q_rotated)"
FUSED = """
L_keys = Reshape(present_key_I, unchanged)
L_values = Reshape(present_value_I, unchanged)
L_attention = Attention<scale = 1.0>(L_q_scaled, L_keys, L_values, mask)"""
RESCALED = FUSED.replace("scale = 1.0", "scale = 0.125")
REPEATED = """
L_key5 = Unsqueeze(present_key_I, axis2)
L_value5 = Unsqueeze(present_value_I, axis2)
L_key_groups = Expand(L_key5, groups)
L_value_groups = Expand(L_value5, groups)
L_keys = Reshape(L_key_groups, heads_shape)
L_values = Reshape(L_value_groups, heads_shape)
L_attention = Attention<scale = 1.0>(L_q_scaled, L_keys, L_values, mask)"""
GROUPED = """
L_q5 = Reshape(L_q_scaled, groups_shape)
L_key5 = Unsqueeze(present_key_I, axis2)
L_value5 = Unsqueeze(present_value_I, axis2)
L_key_turned = Transpose<perm = [0, 1, 2, 4, 3]>(L_key5)
L_scores = MatMul(L_q5, L_key_turned)
L_mask5 = Unsqueeze(mask, axis2)
L_masked = Where(L_mask5, L_scores, smallest)
L_shares = Softmax<axis = -1>(L_masked)
L_attended = MatMul(L_shares, L_value5)
L_attention = Reshape(L_attended, heads_shape)"""
ATTENTIONS = {"fused": FUSED, "rescaled": RESCALED, "repeated": REPEATED, "grouped": GROUPED}
"""What is asked for; K multiplied anew at each step; K and V repeated; products with the groups as an axis, which TensorRT doesn't fuse."""
BFLOAT_ISLAND = """
L_context_b = Cast<to = 16>(L_context)
L_o_t_b = Cast<to = 16>(L_o_t)
L_o_b = MatMul(L_context_b, L_o_t_b)
L_o = Cast<to = 10>(L_o_b)"""
LAYER = """
L_norm1 = RMSNormalization<axis = -1, epsilon = 0.00001>(L_in, L_scale1)
L_qkv = MatMul(L_norm1, L_qkv_t)
L_qkv4 = Reshape(L_qkv, qkv_shape)
{heads}
L_q_rotated = RotaryEmbedding(L_q, cos, sin, position_ids)
L_k_rotated = RotaryEmbedding(L_k, cos, sin, position_ids)
{scaled}
present_key_I = Concat<axis = 2>(past_key_I, L_k_rotated)
present_value_I = Concat<axis = 2>(past_value_I, L_v)
{attention}
L_joined = Transpose<perm = [0, 2, 1, 3]>(L_attention)
L_context = Reshape(L_joined, hidden_shape)
{output}
L_middle = Add(L_in, L_o)
L_norm2 = RMSNormalization<axis = -1, epsilon = 0.00001>(L_middle, L_scale2)
L_gate_up = MatMul(L_norm2, L_gate_up_t)
{split}
L_sigmoid = Sigmoid(L_gate)
L_silu = Mul(L_gate, L_sigmoid)
L_swiglu = Mul(L_silu, L_up)
L_down = MatMul(L_swiglu, L_down_t)
L_out = Add(L_middle, L_down)
"""
CAPACITY = 128
STATIC = {
    HEAD: "\nembedded = Gather(embed, input_ids)\n",
    "present_key_I = Concat<axis = 2>(past_key_I, L_k_rotated)": "present_key_I = TensorScatter(past_key_I, L_k_rotated, cache_write_indices)",
    "present_value_I = Concat<axis = 2>(past_value_I, L_v)": "present_value_I = TensorScatter(past_value_I, L_v, cache_write_indices)",
    "Attention<scale = 1.0>(L_q_scaled, L_keys, L_values, mask)": "Attention<is_causal = 1, scale = 1.0>"
    "(L_q_scaled, L_keys, L_values, , , , key_value_lengths)",
}
"""What the static cache's form has in the place of the dynamic one's."""
LINEARS = {"qkv": ((H + 2 * K) * D, E), "o": (E, H * D), "gate_up": (2 * F, E), "down": (E, F)}
CONSTANTS = (
    f"int64 zero = {{0}}, int64 one = {{1}}, int64[1] axis1 = {{1}}, int64[2] axes12 = {{1, 2}}, int64[1] axis2 = {{2}}, "
    f"int64[4] qkv_shape = {{0, 0, {H + 2 * K}, {D}}}, int64[3] qkv_parts = {{{H}, {K}, {K}}}, "
    f"int64[2] query_parts = {{{H}, {2 * K}}}, int64[2] cache_parts = {{{K}, {K}}}, int64[4] unchanged = {{0, 0, 0, 0}}, "
    f"int64[3] hidden_shape = {{0, 0, {H * D}}}, int64[4] gate_up_shape = {{0, 0, 2, {F}}}, "
    f"int64[5] groups = {{1, 1, {H // K}, 1, 1}}, int64[5] groups_shape = {{0, {K}, {H // K}, -1, {D}}}, int64[4] heads_shape = {{0, {H}, -1, {D}}}, "
    f"float16 smallest = {{{int(np.float16(-65504).view(np.uint16))}}}, "
    f"int64[2] halves = {{1, 1}}, int64[2] widths = {{{F}, {F}}}, float16 q_scale = {{{int(np.float16(D**-0.5).view(np.uint16))}}}"
)
INT8, SMOOTHQUANT = "int8", "int8-smoothquant"
DTYPES = {"int64": "int64", "fp16": "float16"}


def config_of(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=E,
        intermediate_size=F,
        num_hidden_layers=layers,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=D,
        vocab_size=V,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )


def weights_of(layers: int, precision: str) -> dict[str, np.ndarray]:
    """Every stored tensor; values differ everywhere, because TensorRT stores equal constants once."""
    rng = np.random.default_rng(0)
    angles = np.outer(np.arange(POSITIONS), 10000.0 ** -(np.arange(0, D, 2) / D))
    weights = {"embed": rng.normal(0, 0.1, (V, E)).astype(np.float16)}
    weights |= {"cos": np.cos(angles).astype(np.float16), "sin": np.sin(angles).astype(np.float16)}
    for layer in range(layers):
        weights |= {f"l{layer}_scale{i}": rng.normal(1, 0.1, E).astype(np.float16) for i in (1, 2)}
        for name, shape in LINEARS.items():
            if precision == INT8:
                weights[f"l{layer}_{name}_int8"] = rng.integers(-127, 128, shape).astype(np.int8)
                weights[f"l{layer}_{name}_steps"] = rng.uniform(1e-4, 2e-4, shape[0]).astype(np.float16)
            else:
                weights[f"l{layer}_{name}_weight"] = rng.normal(0, 0.02, shape).astype(np.float16)
    return weights | {"last_scale": rng.normal(1, 0.1, E).astype(np.float16)}


@dataclass(frozen=True)
class Form:
    """How the graph is written; the default is what the fusions make, all else is a mistake that an audit has to find."""

    split_last: bool = False
    all_turned: bool = False
    bfloat_output: bool = False
    attention: str = "fused"
    kv_cache: KvCache = "dynamic"
    half_sums: bool = False
    weight_only: tuple[str, ...] = ()

    def head(self) -> str:
        return self._of_cache(HEAD)

    def layer(self) -> str:
        text = LAYER.format(
            heads=ALL_TURNED if self.all_turned else QUERY_APART,
            split=LAST_AXIS if self.split_last else NEW_AXIS,
            scaled=NOT_SCALED if self.attention == "rescaled" else SCALED,
            attention=ATTENTIONS[self.attention],
            output=BFLOAT_ISLAND if self.bfloat_output else "L_o = MatMul(L_context, L_o_t)",
        )
        return self._of_cache(text)

    def _of_cache(self, text: str) -> str:
        for dynamic, static in STATIC.items():
            text = text.replace(dynamic, static) if self.kv_cache == "static" else text
        return text


def graph_text(layers: int, precision: str, weights: dict[str, np.ndarray], form: Form) -> str:
    body = form.head()
    for layer in range(layers):
        text = form.layer()
        for name in LINEARS:
            source = f"L_{name}_weight"
            dequantize = f"{source} = DequantizeLinear<axis = 0>(L_{name}_int8, L_{name}_steps)\n" if precision == INT8 else ""
            first = "L_context_b" if name == "o" and form.bfloat_output else f"L_{name}"
            text = text.replace(f"{first} =", f"{dequantize}L_{name}_t = Transpose<perm = [1, 0]>({source})\n{first} =")
        text = text.replace("_I", f"_{layer}").replace("L_in", f"l{layer - 1}_out" if layer else "embedded")
        body += text.replace("L_", f"l{layer}_")
    body += f"normed = RMSNormalization<axis = -1, epsilon = 0.00001>(l{layers - 1}_out, last_scale)\n"
    body += "head = Transpose<perm = [1, 0]>(embed)\nlogits = MatMul(normed, head)\n"
    config = config_of(layers)
    inputs = [f"{DTYPES[v.dtype]}[{','.join(map(str, v.shape))}] {text_name(v.name)}" for v in graph_inputs(config, "fp16", form.kv_cache)]
    outputs = [f"{DTYPES[v.dtype]}[{','.join(map(str, v.shape))}] {text_name(v.name)}" for v in graph_outputs(config, "fp16", form.kv_cache)]
    stored = [f"{array.dtype}[{','.join(map(str, array.shape))}] {name}" for name, array in weights.items()]
    head = f'<ir_version: 11, opset_import: ["" : {OPSETS[form.kv_cache]}]>'
    return f"{head}\ng ({', '.join(inputs + stored)}) => ({', '.join(outputs)})\n<{CONSTANTS}>\n{{{body}}}"


def text_name(name: str) -> str:
    """`past_key_values.3.key` → `past_key_3`; the text format knows no dots."""
    parts = name.split(".")
    return name if len(parts) == 1 else f"{parts[0].removesuffix('_key_values')}_{parts[2]}_{parts[1]}"


@dataclass(frozen=True)
class Stage:
    path: Path
    config: LlamaConfig
    kv_cache: KvCache = "dynamic"

    @property
    def engine_graph(self) -> Path:
        out = self.path.with_name(f"{self.path.stem}-engine.onnx")
        if not out.exists():
            write_engine_graph(self.path, out, capacity=CAPACITY if self.kv_cache == "static" else None)
        return out


def write_stage(folder: Path, layers: int, precision: str, **form: Any) -> Stage:
    """Write `fused.onnx` or `int8.onnx` with its weights in `weights/all.bin`."""
    weights = weights_of(layers, precision)
    shape = Form(**form)
    kv_cache = shape.kv_cache
    model = ir.from_onnx_text(graph_text(layers, precision, weights, shape))
    graph, config = model.graph, config_of(layers)
    for value in list(graph.inputs):
        if value.name in weights:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(weights[value.name], name=value.name)
            graph.register_initializer(value)
    interface = graph_inputs(config, "fp16", kv_cache), graph_outputs(config, "fp16", kv_cache)
    for values, expected in zip((graph.inputs, graph.outputs), interface, strict=True):
        for value, spec in zip(values, expected, strict=True):
            value.name = spec.name
    for node in graph:
        node.name = f"node_{node.outputs[0].name}"
        match = re.match(r"l(\d+)_", node.outputs[0].name or "")
        node.metadata_props[MODULE_KEY] = f"model.layers.{match[1]}" if match else ""
    if not shape.half_sums:
        apply_reader(model, accumulate)
        for node in graph:
            node.metadata_props.setdefault(MODULE_KEY, "")
    if precision == SMOOTHQUANT:
        make_islands(graph, shape.weight_only)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").mkdir(exist_ok=True)
    path = folder / f"{precision if precision in (INT8, SMOOTHQUANT) else 'fused'}.onnx"
    ir.save(model, path, external_data="weights/all.bin")
    return Stage(path, config, kv_cache)


def make_islands(graph: ir.Graph, weight_only: Sequence[str]) -> None:
    """W8A8 for every linear of a layer, W8A16 for those whose name ends in one of ``weight_only`` (`0_down`)."""
    rng, islands = np.random.default_rng(7), Islands(graph)
    for linear in [linear for linear in find_linears(graph) if re.match(r"l\d+_", linear.name)]:
        name, shape = linear.name.removesuffix("_weight"), linear.weight.shape.numpy()  # type: ignore[union-attr]
        alone = name.endswith(tuple(weight_only))
        steps, step = rng.uniform(1e-4, 2e-4, shape[0]).astype(np.float16 if alone else np.float32), float(rng.uniform(0.02, 0.03))
        operands = [store(graph, f"{name}_int8", rng.integers(-127, 128, shape).astype(np.int8)), store(graph, f"{name}_steps", steps)]
        if not alone:
            islands.put(linear, step, *operands)
            continue
        node = ir.node("DequantizeLinear", operands, {"axis": 0}, name=f"node_{name}_weight", metadata_props=dict(linear.transpose.metadata_props))
        node.outputs[0].type, node.outputs[0].shape = linear.weight.type, linear.weight.shape
        graph.insert_before(linear.transpose, node)
        linear.transpose.replace_input_with(0, node.outputs[0])
        del graph.initializers[str(linear.weight.name)]


def store(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.initializers.add(value)
    return value


@pytest.fixture(scope="session")
def make_stage() -> Callable[..., Stage]:
    return write_stage


def build_plan(stage: Stage, max_batch: int) -> Path:
    plan = stage.path.with_name("model.plan")
    length = CAPACITY if stage.kv_cache == "static" else POSITIONS
    profiles = make_profiles(stage.config, "fp16", stage.kv_cache, max_batch=max_batch, max_length=length)
    TensorRTRTX().build(BuildRequest(stage.engine_graph, plan, find_target("a100"), tuple(profiles)), silent)
    return plan


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Stage, Path]]:
    """`built(layers, precision, split_last=True)`, with any field of ``Form`` → a stage and its real plan, built once a session.

    Split on the last axis, gate·up is stored twice, but only where decode multiplies exactly one row: at a batch of 1.
    """
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    done: dict[tuple[object, ...], tuple[Stage, Path]] = {}

    def get(layers: int, precision: str = "fp16", **form: Any) -> tuple[Stage, Path]:
        key = (layers, precision, *sorted(form.items()))
        if key not in done:
            stage = write_stage(tmp_path_factory.mktemp("engine"), layers, precision, **form)
            done[key] = (stage, build_plan(stage, max_batch=1 if form.get("split_last") else 2))
        return done[key]

    return get
