"""The shape of a Llama model, in Hugging Face's words, and the table of config keys that are used, harmless or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from artifact.errors import CheckpointError

HARMLESS = frozenset(
    "_name_or_path architectures attention_dropout auto_map dtype initializer_range is_llama_config model_type pad_token_id pretraining_tp "
    "rope_interleaved torch_dtype transformers_version unsloth_fixed unsloth_version use_cache transformers.js_config sliding_window "
    "use_sliding_window name max_length temperature top_p do_sample num_labels id2label label2id return_dict output_attentions "
    "output_hidden_states chunk_size_feed_forward is_encoder_decoder problem_type".split()
)
"""Keys that change nothing in the graph or the weights."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
"""Keys that change the model, with the values that are supported; every other value is refused by name."""

ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """One Llama-architecture model; names as in Hugging Face's config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name.endswith(("size", "layers", "heads", "dim", "embeddings")) and not isinstance(value, bool) and value <= 0:
                raise CheckpointError(f"config: {name} must be positive, got {value}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim {self.head_dim} is odd; rotary embedding rotates pairs")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a Hugging Face ``config.json``.

        Raises:
            CheckpointError: another architecture, a missing key, or a value that changes the model and is not supported.
        """
        refuse_unsupported(config)
        heads = _required(config, "num_attention_heads")
        hidden_size = _required(config, "hidden_size")
        if config.get("head_dim") is None and hidden_size % heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, and head_dim is not given"
            )
        eos = config.get("eos_token_id")
        return cls(
            hidden_size=hidden_size,
            intermediate_size=_required(config, "intermediate_size"),
            num_hidden_layers=_required(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden_size // heads,
            vocab_size=_required(config, "vocab_size"),
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=_rope_theta(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        )

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that Hugging Face transformers reads as the same model."""
        eos = self.eos_token_id
        fields = asdict(self) | {"eos_token_id": list(eos) if isinstance(eos, tuple) else eos}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **fields,
        }


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json that are in no table: reported, because a key nobody reads may be one that matters."""
    known = HARMLESS | REFUSED.keys() | ROPE_KEYS | set(LlamaConfig.__dataclass_fields__)
    return sorted(set(config) - known)


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for another architecture, or a key whose value is not supported, by name."""
    model_type = config.get("model_type")
    if model_type != "llama":
        raise CheckpointError(
            f"config.json: model_type is {model_type!r}; supported: 'llama'",
            hint="convert the checkpoint to the Llama architecture, or use the exporter of its own family",
        )
    for key, allowed in REFUSED.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(f"config.json: {key} = {config[key]!r} is not supported; supported: {', '.join(map(repr, allowed))}")
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"config.json: {key}.rope_type = {kind!r} is not supported; supported: 'default'")


def _rope_theta(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _required(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} must be an integer, got {value!r}")
    return value
