"""What a GPU can do at best with a model: tokens a second in decode, time to the first token. An upper bound to judge a measured figure by.

Decode reads every weight and the cache once a step: bandwidth bounds it. Prefill multiplies every weight by every token: the peak of the tensor
cores bounds it, or the bandwidth where the prompt is short. Weight-only INT8 and INT4 halve and quarter what decode reads, and multiply in float16
all the same; INT8 by INT8 multiplies at twice the rate too.
Letters: B batch, S prompt tokens, T tokens in the cache, L layers, H query heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from artifact.config import LlamaConfig
from artifact.io_spec import cache_bytes
from engines.targets import Target
from engines.weight_sizes import float_dtype, linear_parameters, weight_sizes

INTEGER_MATH = ("int8-smoothquant",)
"""Precisions whose linears multiply int8 by int8; what a placement keeps out of that does not, and the bound holds all the more."""
DECODE_SHARE, PREFILL_SHARE = (0.65, 0.75), (0.60, 0.66)
"""What published A100 figures reach of the two bounds (TensorRT-LLM 0.5, lmdeploy 0.1; Llama 2, FP16)."""


@dataclass(frozen=True)
class Roofline:
    """The bounds of one precision on one target.

    Attributes:
        decode_tokens_per_s: B ÷ the time of a step.
        decode_step_ms: one step of all rows.
        time_to_first_token_ms: one prompt a row; None for fp32, whose peak no target states.
        step_bytes: that a decode step reads: weights and cache.
    """

    decode_tokens_per_s: float
    decode_step_ms: float
    time_to_first_token_ms: float | None
    step_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Rounded, for a report."""
        return {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()}


def roofline(config: LlamaConfig, precision: str, target: Target, *, batch: int = 1, prompt: int = 2048, cached: int = 0) -> Roofline:
    """The bounds.

    Args:
        config: of the model.
        precision: of the engine.
        target: the GPU.
        batch: B.
        prompt: S, of each row.
        cached: T that a decode step reads; of a static cache its capacity, used or not.
    """
    sizes = weight_sizes(config, precision)
    step_bytes = sizes.read_by_a_step + batch * cache_bytes(config, float_dtype(precision), cached)
    step_s = step_bytes / (target.bandwidth_gb_s * 1e9)
    return Roofline(batch / step_s, step_s * 1e3, _prefill_ms(config, precision, target, batch, prompt), step_bytes)


def prefill_flops(config: LlamaConfig, tokens: int) -> tuple[int, int]:
    """Operations of one prompt: (the layers' linears, and the rest: causal attention and lm_head for one position)."""
    attention = 2 * tokens**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers  # half of the full square, two products
    return 2 * linear_parameters(config) * tokens, attention + 2 * config.vocab_size * config.hidden_size


def _prefill_ms(config: LlamaConfig, precision: str, target: Target, batch: int, prompt: int) -> float | None:
    if precision == "fp32":
        return None
    linears, others = prefill_flops(config, prompt)
    peak = target.peak_int8_tops if precision in INTEGER_MATH else target.peak_fp16_tflops
    math_s = batch * (linears / (peak * 1e12) + others / (target.peak_fp16_tflops * 1e12))
    read_s = weight_sizes(config, precision).read_by_a_step / (target.bandwidth_gb_s * 1e9)
    return max(math_s, read_s) * 1e3


def compare(config: LlamaConfig, precision: str, target: Target, *, batch: int, prompt: int, cached: int) -> dict[str, Any]:
    """By how much a precision is faster than FP16 at best, in prefill and in decode, and why; factors above 1 are faster."""
    shape = {"batch": batch, "prompt": prompt, "cached": cached}
    own, half = roofline(config, precision, target, **shape), roofline(config, "fp16", target, **shape)
    prefill = None
    if own.time_to_first_token_ms is not None and half.time_to_first_token_ms is not None:
        prefill = round(half.time_to_first_token_ms / own.time_to_first_token_ms, 2)
    decode = round(half.decode_step_ms / own.decode_step_ms, 2)
    return {"precision": precision, "decode": decode, "prefill": prefill, "why": _why(precision)}


def _why(precision: str) -> str:
    if precision in INTEGER_MATH:
        return "decode reads half the bytes; prefill multiplies int8 by int8 at twice float16's rate where every linear does"
    if precision in ("int8", "int4"):
        return "decode reads fewer bytes; prefill multiplies in float16 all the same, and converts every weight first: not faster, often slower"
    return (
        "the precision that the others are compared with" if precision == "fp16" else "decode reads twice the bytes; for exact parity, not for speed"
    )
