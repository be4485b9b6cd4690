"""Which weights a Llama has, in which order they are stored, and in which file: q·k·v and gate·up lie side by side, weights and biases alike.

A packed projection is then a wider view of the same bytes (design: weights are written once and never rewritten).
Letters: V vocab, E hidden, F ffn, H query heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from math import prod

from artifact.config import LlamaConfig

MODULE_KEY = "module"
"""The one piece of node metadata that is ours: the module path a node was traced from, `model.layers.3.self_attn.q_proj`."""

PACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Packed projection → the projections whose rows it holds, in stored order."""

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SHARED_FILE = "weights/shared.safetensors"


def layer_prefix(layer: int) -> str:
    """`model.layers.3`, the module path of a decoder layer."""
    return f"model.layers.{layer}"


def layer_of(module: str | None) -> int | None:
    """Layer index of a module path (`model.layers.3.mlp` → 3); None for what is outside the layers."""
    parts = (module or "").split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdigit() else None


def members(module: str) -> tuple[str, ...]:
    """The linears of the checkpoint whose rows a linear of a graph holds: three of a packed q·k·v, two of gate·up, else itself."""
    layer = layer_of(module)
    prefix = "" if layer is None else f"{layer_prefix(layer)}."
    name = module.removeprefix(prefix)
    return tuple(prefix + member for member in PACKED.get(name, (name,)))


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Module name within a layer → weight shape [out, in], in stored order."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def has_bias(config: LlamaConfig, linear: str) -> bool:
    """Whether a linear of a layer (`self_attn.q_proj`) has a bias."""
    return config.attention_bias if linear.startswith("self_attn.") else config.mlp_bias


def layer_shapes(config: LlamaConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Weight name → shape for one decoder layer, in stored order."""
    prefix = layer_prefix(layer)
    linears = linear_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{prefix}.{name}.bias": shape[:1] for name, shape in linears.items() if has_bias(config, name)}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{prefix}.{norm}.weight"] = (config.hidden_size,)
    return shapes


def shared_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Weights outside the layers; a tied lm_head is the embedding and is stored once."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size), FINAL_NORM: (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the model: Hugging Face name → shape, in stored order."""
    shapes = shared_shapes(config)
    for layer in range(config.num_hidden_layers):
        shapes |= layer_shapes(config, layer)
    return shapes


def layer_file(layer: int) -> str:
    """Path of a layer's weights, relative to the artifact folder."""
    return f"weights/layer-{layer:03d}.safetensors"


def weight_files(config: LlamaConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Weight file → {name: shape} in stored order."""
    files = {SHARED_FILE: shared_shapes(config)}
    return files | {layer_file(layer): layer_shapes(config, layer) for layer in range(config.num_hidden_layers)}


LARGE = 1_500_000_000
"""Parameters above which a model is large: nothing of it is run whole in float32, and its scenarios are shorter."""


def parameter_count(config: LlamaConfig) -> int:
    """Parameters of the model, tied weights once."""
    return sum(prod(shape) for shape in tensor_shapes(config).values())
