"""The shape of a Llama model, in Hugging Face's words, and the table of config keys that are used, harmless or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from artifact.errors import CheckpointError
from artifact.numbers import integer, positive_number, token_id
from artifact.rope_scaling import DEFAULT_LENGTH, SPELLINGS, RopeScaling, rope_from_hf, scaling_of, tuple_of, unknown_rope_keys

HARMLESS = frozenset(
    "_name_or_path architectures attention_dropout auto_map dtype initializer_range is_llama_config model_type pad_token_id pretraining_tp "
    "rope_interleaved torch_dtype transformers_version unsloth_fixed unsloth_version use_cache transformers.js_config sliding_window "
    "use_sliding_window name max_length temperature top_p do_sample num_labels id2label label2id return_dict output_attentions "
    "output_hidden_states chunk_size_feed_forward is_encoder_decoder problem_type".split()
)
"""Keys that change nothing in the graph or the weights."""

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, True, None),
    "mlp_bias": (False, True, None),
    "tie_word_embeddings": (False, True, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
"""Keys that change the model, with the values that are supported; every other value is refused by name."""

ROPE_KEYS = frozenset({"rope_theta", "original_max_position_embeddings", *SPELLINGS})


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """One Llama-architecture model; names as in Hugging Face's config.json.

    ``attention_bias`` is a bias on all four linears of attention, ``mlp_bias`` one on all three of the MLP. A config that was read from a
    manifest (``LlamaConfig(**record)``) equals the one that was written.
    """

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
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_scaling", scaling_of(self.rope_scaling))
        object.__setattr__(self, "eos_token_id", tuple_of(self.eos_token_id))
        for name, value in asdict(self).items():
            if name.endswith(("size", "layers", "heads", "dim", "embeddings")) and not isinstance(value, bool) and value <= 0:
                raise CheckpointError(f"config: {name} must be positive, got {value}")
        self._check_numbers()
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"config: hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "transformers refuses such a Llama too, with a head_dim or without"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim {self.head_dim} is odd; rotary embedding rotates pairs")
        factors = self.rope_scaling.frequency_factors if self.rope_scaling is not None else None
        if factors is not None and len(factors) != self.head_dim // 2:
            raise CheckpointError(f"config: {len(factors)} rotary frequency factors for head_dim {self.head_dim}; expected {self.head_dim // 2}")

    def _check_numbers(self) -> None:
        """Ranges that no reader may miss: a NaN here would be in every graph."""
        positive_number("config: rms_norm_eps", self.rms_norm_eps)
        positive_number("config: rope_theta", self.rope_theta)
        if self.rope_theta <= 1 and self.rope_scaling is not None and self.rope_scaling.rope_type == "yarn":
            raise CheckpointError(f"config: rope_type 'yarn' needs a rope_theta above 1, got {self.rope_theta}")
        token_id("config: bos_token_id", self.bos_token_id)
        for value in self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,):
            token_id("config: eos_token_id", value)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read a Hugging Face ``config.json``.

        Raises:
            CheckpointError: another architecture, a missing key, or a value that changes the model and is not supported.
        """
        refuse_unsupported(config)
        heads = _required(config, "num_attention_heads")
        hidden_size = _required(config, "hidden_size")
        length = _integer(config, "max_position_embeddings", DEFAULT_LENGTH)
        rope_theta, rope_scaling = rope_from_hf(config)
        return cls(
            hidden_size=hidden_size,
            intermediate_size=_required(config, "intermediate_size"),
            num_hidden_layers=_required(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_integer(config, "num_key_value_heads", heads),
            head_dim=_integer(config, "head_dim", hidden_size // max(heads, 1)),
            vocab_size=_required(config, "vocab_size"),
            max_position_embeddings=length,
            rms_norm_eps=positive_number("config.json: rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta,
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
            attention_bias=bool(config.get("attention_bias")),
            mlp_bias=bool(config.get("mlp_bias")),
            rope_scaling=rope_scaling,
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=config.get("eos_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that Hugging Face transformers reads as the same model."""
        eos = self.eos_token_id
        fields = asdict(self) | {"eos_token_id": list(eos) if isinstance(eos, tuple) else eos}
        del fields["rope_scaling"]
        scaling = {} if self.rope_scaling is None else {"rope_scaling": self.rope_scaling.to_hf()}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **fields, **scaling}


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json that are in no table: reported, because a key nobody reads may be one that matters."""
    known = HARMLESS | REFUSED.keys() | ROPE_KEYS | set(LlamaConfig.__dataclass_fields__)
    return sorted([*set(config) - known, *unknown_rope_keys(config)])


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


def _integer(config: Mapping[str, Any], key: str, default: int) -> int:
    """``default`` where the key is absent or null."""
    return default if config.get(key) is None else _required(config, key)


def _required(config: Mapping[str, Any], key: str) -> int:
    return integer(f"config.json: {key}", config.get(key))
