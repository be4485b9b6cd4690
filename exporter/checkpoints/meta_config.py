"""Meta's params.json, with what it leaves out taken from the weights or assumed and said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.numbers import positive_integer, positive_number
from artifact.rope_scaling import RopeScaling
from exporter.checkpoints.json_file import read_object
from exporter.checkpoints.shards import inside

PARAMS = "params.json"
USED = frozenset(
    "dim n_layers n_heads n_kv_heads vocab_size norm_eps rope_theta multiple_of ffn_dim_multiplier max_seq_len rope_scale_factor".split()
)
HARMLESS = frozenset({"max_batch_size", "model_parallel_size"})
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "use_scaled_rope": (False, True, None),
    "quantization_args": (None,),
    "lora_args": (None,),
    "moe": (None,),
}
"""Keys that change the model, with the values that are supported."""
LLAMA2_IDS = (1, 2)
"""bos and eos of Meta's SentencePiece file, which params.json does not say."""
CONTEXT, LLAMA1_CONTEXT = 4096, 2048
NORM_EPS = 1e-5
"""What Meta's code takes where params.json says nothing."""


def read_params(folder: Path) -> dict[str, Any]:
    """The folder's params.json.

    Raises:
        CheckpointError: none there, not a JSON object, or a value that is not supported.
    """
    params = read_object(inside(folder, PARAMS), hint="download it too: it is beside the consolidated.*.pth")
    for key, allowed in REFUSED.items():
        if params.get(key) not in allowed:
            raise CheckpointError(f"{PARAMS}: {key} = {params[key]!r} is not supported; supported: {', '.join(map(repr, allowed))}")
    for key in ("dim", "n_layers", "n_heads"):
        _positive(params, key)
    return params


def config_from_meta(
    params: Mapping[str, Any], *, ffn: int, vocab_size: int, size: str | None = None, ids: tuple[int | None, int | None] = LLAMA2_IDS
) -> tuple[LlamaConfig, list[str]]:
    """The config, and what was assumed for it, one line each.

    Args:
        params: checked by ``read_params``.
        ffn: rows of w1 over all parts; params.json gives only how it was rounded.
        vocab_size: rows of the embedding over all parts; the published files say -1.
        size: what ``--size`` said; Llama 1 was trained on half the context.
        ids: bos and eos.

    Raises:
        CheckpointError: a value that is no number, or that disagrees with the weights.
    """
    if params.get("vocab_size", -1) not in (-1, vocab_size):
        raise CheckpointError(f"{PARAMS}: vocab_size {params['vocab_size']} disagrees with tok_embeddings.weight, which has {vocab_size} rows")
    _check_ffn(params, ffn)
    heads, dim = _positive(params, "n_heads"), _positive(params, "dim")
    if dim % heads:
        raise CheckpointError(f"{PARAMS}: dim {dim} is not a multiple of n_heads {heads}")
    context, notes = _context(params, size)
    if "norm_eps" not in params:
        notes.append(f"{PARAMS} has no norm_eps: {NORM_EPS} assumed")
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=_positive(params, "n_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_positive(params, "n_kv_heads") if params.get("n_kv_heads") is not None else heads,
        head_dim=dim // heads,
        vocab_size=vocab_size,
        max_position_embeddings=context,
        rms_norm_eps=_number(params, "norm_eps", NORM_EPS),
        rope_theta=_number(params, "rope_theta", 10000.0),
        tie_word_embeddings=False,
        rope_scaling=_rope_scaling(params),
        bos_token_id=ids[0],
        eos_token_id=ids[1],
    )
    return config, notes


def unknown_params(params: Mapping[str, Any]) -> list[str]:
    """Keys that are in no table."""
    return sorted(set(params) - USED - HARMLESS - REFUSED.keys())


def _context(params: Mapping[str, Any], size: str | None) -> tuple[int, list[str]]:
    if params.get("max_seq_len") is not None:
        return _positive(params, "max_seq_len"), []
    llama1 = size is not None and size.startswith("llama1")
    context, model = (LLAMA1_CONTEXT, "Llama 1") if llama1 else (CONTEXT, "Llama 2")
    return context, [f"{PARAMS} does not say the context length: {context} assumed, as for {model}"]


def _rope_scaling(params: Mapping[str, Any]) -> RopeScaling | None:
    """What ``use_scaled_rope`` means in the code of Llama 3; the published files leave out its factor, which is another one in 3.1 and 3.2."""
    if not params.get("use_scaled_rope"):
        return None
    if params.get("rope_scale_factor") is None:
        raise CheckpointError(
            f"{PARAMS}: use_scaled_rope without rope_scale_factor: Llama 3.1 and 3.2 scale by different factors",
            hint=f'add "rope_scale_factor" to {PARAMS}: 8 for Llama 3.1, 32 for Llama 3.2',
        )
    factor = positive_number(f"{PARAMS}: rope_scale_factor", params["rope_scale_factor"])
    return RopeScaling(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def _check_ffn(params: Mapping[str, Any], ffn: int) -> None:
    """Meta's rule: two thirds of 4·dim, times a factor, rounded up to a multiple; each step to whole numbers."""
    if params.get("multiple_of") is None:
        return
    multiple, factor = _positive(params, "multiple_of"), params.get("ffn_dim_multiplier")
    width = int(2 * 4 * _positive(params, "dim") / 3)
    if factor is not None:
        width = int(_number(params, "ffn_dim_multiplier", 1.0) * width)
    expected = multiple * -(-width // multiple)
    if expected != ffn:
        raise CheckpointError(
            f"{PARAMS}: multiple_of {multiple} and ffn_dim_multiplier {factor} give {expected} rows of feed_forward.w1, the weights have {ffn}",
            hint=f"take {PARAMS} and weights from the same model",
        )


def _positive(params: Mapping[str, Any], key: str) -> int:
    return positive_integer(f"{PARAMS}: {key}", params.get(key))


def _number(params: Mapping[str, Any], key: str, default: float) -> float:
    """``default`` where the key is absent or null."""
    return default if params.get(key) is None else positive_number(f"{PARAMS}: {key}", params[key])
