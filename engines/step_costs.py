"""What each step takes of the machine: peak memory, disk, time. Memory and disk are measured rules; times scale with two rates, and are rough.

Letters: L decoder layers, E hidden, F ffn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from artifact.calibration import SAMPLES, STATIC, calibration_tokens
from artifact.config import LlamaConfig
from artifact.io_spec import DTYPE_BYTES, Dtype, KvCache
from artifact.layout import LARGE, parameter_count
from artifact.room import fits_whole
from engines.build_cost import MEGABYTE, BuildCost, build_cost
from engines.form_limits import QUANTIZED_TYPES
from engines.part_plan import part_graph
from engines.placement_costs import placement_costs, site_channels
from engines.step_cost import DRIVEN_WEIGHTS_S, REFERENCE, Rates, StepCost, layer_float32, torch_memory
from engines.weight_sizes import float_dtype, largest_linear, linear_parameters, weight_sizes

DOWNLOAD = "download"
SIDECAR_BYTES = 64 * MEGABYTE
"""Graphs, tokenizer, manifest, reports."""
EXPORT_MEMORY = 560 * MEGABYTE
"""Of any size and format: a block of weights at a time (355 to 554 MB measured at 7B, 13B and 70B widths, docs/export.md)."""
DOWNLOAD_MEMORY, DOWNLOAD_BYTES_S = 240 * MEGABYTE, 50e6
"""The hub's client, imported; files are streamed. No rate is measured, because an estimate asks no network."""
FUSE_MEMORY, FUSE_MEMORY_A_LAYER = 125 * MEGABYTE, 600_000
QUANTIZE_MEMORY, QUANTIZE_VALUES, DRIVEN_VALUES = 240 * MEGABYTE, 2.0, 8.0
"""A linear's levels, and as they are stored, some at a time; with rows and products where calibration drives rounding (7B: 0.4 and 1.0 GB)."""
SCORED_TOKENS = 2048

PLACED = STATIC
"""Precisions that are placed within a limit on perplexity where nothing else is asked for."""

EXPORT_S, EXPORT_GB_S = 12.0, 0.5
FUSE_S, FUSE_S_A_LAYER = 2.0, 0.05
QUANTIZE_S, PLAIN_WEIGHTS_S = 4.0, 190e6
"""Weights a second, plainly."""
VALIDATE_S = 30.0
CHECKED_S, STAGE_S, RANGES_S = 21e-9, 56e-9, 10.5e-9
"""Of a weight: checksums, reference and floor, once; scenarios, strict mode and layers alone, of each stage; a quantised one's range audit. Fitted to
7B on two cores that did nothing else (docs/full-size.md); an engine graph takes its stage's layers, and costs seconds."""
READ_TOKENS, TEXT_PASSES, FASTER = 3072, 2, 1.9
"""Tokens of the texts' windows where 2,048 are scored; passes over them besides the stages': the reference, and what float16 costs; and how much
faster torch and ONNX Runtime multiply many tokens than the rate that is measured."""
VALIDATE_MEMORY, KEPT_A_LAYER, COPIES, STATES = 150 * MEGABYTE, 12 * MEGABYTE, 2, 3
"""torch and ONNX Runtime; what stays of each layer; the larger of a layer and lm_head, twice while it is packed for the processor; hidden states of
the texts' windows: the reference's, and what enters and leaves a layer."""
COMPARED, SCENARIO_TOKENS = 12, 256
"""Arrays of a scenario's logits in float32, or half as many in float64, that are alive while a graph loaded whole is compared."""
DECODED_BELOW = LARGE
"""Parameters up to which the reference continues prompts with all its layers in memory (validation/continuations.py)."""


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        precision: of the engine.
        kv_cache: form of the cache.
        calibrated: whether activations are measured on a text first.
        packed: q·k·v and gate·up are one linear each.
        plans: what building each part takes, one after the other; empty: one plan.
        download_bytes: of a checkpoint that is not here.
        done: steps that need not be done again.
        free_bytes: of memory, by which validating loads graphs whole or streams them; 0 streams.
    """

    precision: str
    kv_cache: KvCache = "dynamic"
    calibrated: bool = True
    packed: bool = True
    plans: tuple[BuildCost, ...] = ()
    download_bytes: int = 0
    done: frozenset[str] = frozenset()
    free_bytes: int = 0

    @property
    def dtype(self) -> Dtype:
        """Of the artifact."""
        return float_dtype(self.precision)

    @property
    def is_placed(self) -> bool:
        """Whether linears are chosen within a limit on perplexity; that is done anew with every `quantize`."""
        return self.precision in PLACED and self.calibrated and "quantize" not in self.done


def step_costs(config: LlamaConfig, work: Work, rates: Rates = REFERENCE) -> list[StepCost]:
    """The steps that lead to a validated engine, in order; those that a precision does not need are left out."""
    quantised, fused = work.precision in QUANTIZED_TYPES, work.precision != "fp32"
    stages = 1 + fused + quantised
    steps = [download_cost(work.download_bytes)] if work.download_bytes else []
    steps += [export_cost(config, work.dtype, rates), *([fuse_cost(config, rates)] if fused else [])]
    if quantised:
        steps += [calibrate_cost(config, calibration_tokens(work.precision), rates)] * work.calibrated
        steps += placement_costs(config, rates) if work.is_placed else []
        steps += [quantize_cost(config, work.precision, rates, calibrated=work.calibrated)]
    whole = fits_whole(DTYPE_BYTES["fp32"] * parameter_count(config), work.free_bytes)
    steps += [plan_cost(config, work, rates), validate_cost(config, stages, rates, quantised=quantised, whole=whole)]
    return [step for step in steps if step.step not in work.done]


def download_cost(size: int) -> StepCost:
    """Hub → its cache."""
    return StepCost(DOWNLOAD, DOWNLOAD_MEMORY, size, size / DOWNLOAD_BYTES_S, f"at {DOWNLOAD_BYTES_S / 1e6:.0f} MB/s, which was not measured")


def export_cost(config: LlamaConfig, dtype: Dtype, rates: Rates = REFERENCE) -> StepCost:
    """Checkpoint → weights; a download is not in it."""
    size = DTYPE_BYTES[dtype] * parameter_count(config) + SIDECAR_BYTES
    speed = EXPORT_GB_S * min(1.0, rates.disk_gb_s / REFERENCE.disk_gb_s)
    return StepCost("export", EXPORT_MEMORY, size, EXPORT_S + size / (speed * 1e9), f"written, hashed and audited at {speed:.2f} GB/s")


def fuse_cost(config: LlamaConfig, rates: Rates = REFERENCE) -> StepCost:
    """Graph → graph; no weight is touched."""
    layers = config.num_hidden_layers
    return StepCost("fuse", FUSE_MEMORY + FUSE_MEMORY_A_LAYER * layers, 0, FUSE_S + FUSE_S_A_LAYER * layers, f"{FUSE_S_A_LAYER} s a layer")


def calibrate_cost(config: LlamaConfig, tokens: int, rates: Rates = REFERENCE) -> StepCost:
    """Float32 over the calibration text, a layer at a time; `run` deletes what it writes when all is done."""
    seconds = 10 + 2 * linear_parameters(config) * tokens / (rates.gflops * 1e9)
    hidden = 3 * tokens * config.hidden_size * DTYPE_BYTES["fp32"]
    size = site_channels(config) * SAMPLES * DTYPE_BYTES["fp16"]
    return StepCost("calibrate", torch_memory(config) + hidden, size, seconds, f"{tokens:,} tokens at {rates.gflops:.0f} GFLOP/s")


def quantize_cost(config: LlamaConfig, scheme: str, rates: Rates = REFERENCE, *, calibrated: bool = True, head: bool = False) -> StepCost:
    """Levels and scales beside the weights that they stand for; ``head``: the output layer's too, rounded plainly."""
    largest = largest_linear(config)
    values = DRIVEN_VALUES if calibrated else QUANTIZE_VALUES
    slower = min(1.0, rates.disk_gb_s / REFERENCE.disk_gb_s)  # plain rounding is bound by memory, and by the disk below it
    speed = DRIVEN_WEIGHTS_S * rates.gflops / REFERENCE.gflops if calibrated else PLAIN_WEIGHTS_S * slower
    size = config.num_hidden_layers * weight_sizes(config, scheme).layer
    how = "rounded by calibration" if calibrated else "rounded plainly"
    seconds = QUANTIZE_S + linear_parameters(config) / speed
    memory = max(int(values * largest), int(QUANTIZE_VALUES * config.vocab_size * config.hidden_size) if head else 0)
    return StepCost("quantize", QUANTIZE_MEMORY + memory, size, seconds, f"{speed / 1e6:.1f} million weights a second, {how}")


def plan_cost(config: LlamaConfig, work: Work, rates: Rates = REFERENCE) -> StepCost:
    """Compiler and audit; in parts the memory is the largest part's, disk and time are all parts'."""
    sizes, static = weight_sizes(config, work.precision), work.kv_cache == "static"
    whole = part_graph(sizes, (0, sizes.layers - 1), work.precision, packed=work.packed, static=static, tied=config.tie_word_embeddings)
    plans = work.plans or (build_cost(whole),)
    memory, disk = max(plan.memory_bytes for plan in plans), sum(plan.plan_bytes for plan in plans)
    slower = max(1.0, REFERENCE.gflops / rates.gflops, REFERENCE.disk_gb_s / rates.disk_gb_s)
    seconds = slower * sum(plan.seconds for plan in plans)
    return StepCost("build", memory, disk, seconds, "0.27 s a layer, weights at 0.3 GB/s")


def validate_cost(
    config: LlamaConfig, stages: int = 3, rates: Rates = REFERENCE, *, quantised: int = 1, text: bool = True, whole: bool = False, closer: int = 0
) -> StepCost:
    """Reference and stages, a layer at a time.

    Args:
        config: of the model.
        stages: graphs that are measured, engine graphs aside; ``quantised`` of them are.
        rates: of the machine.
        text: whether there is a tokenizer, and texts are scored.
        whole: whether graphs are loaded with all their weights in float32.
        closer: ``closer_memory``, where an error is narrowed or edges are run.
    """
    weights = linear_parameters(config)
    seconds = weights * (CHECKED_S + STAGE_S * stages + RANGES_S * quantised) * REFERENCE.gflops / rates.gflops
    seconds += text * 2 * weights * READ_TOKENS * (TEXT_PASSES + stages) / (FASTER * rates.gflops * 1e9)
    how = f"{stages} stages{f' and {SCORED_TOKENS:,} tokens of text' if text else ''} at {rates.gflops:.0f} GFLOP/s"
    loaded = DTYPE_BYTES["fp32"] * (parameter_count(config) + COMPARED * SCENARIO_TOKENS * config.vocab_size) if whole else 0
    return StepCost("validate", max(validate_memory(config) + loaded, closer), SIDECAR_BYTES, VALIDATE_S + seconds, how)


def validate_memory(config: LlamaConfig) -> int:
    """Of one layer, or of lm_head where that is larger: what is kept of the others lies on disk. A small model is decoded, all layers in memory."""
    width = DTYPE_BYTES["fp32"]
    head = config.vocab_size * config.hidden_size * width
    decoded = width * linear_parameters(config) + head if parameter_count(config) <= DECODED_BELOW else 0
    kept = KEPT_A_LAYER * config.num_hidden_layers + STATES * READ_TOKENS * config.hidden_size * width
    return VALIDATE_MEMORY + kept + max(COPIES * max(layer_float32(config), head), decoded)


def disk_total(steps: list[StepCost]) -> int:
    """What all steps together write; `run` deletes what was calibrated when all is done."""
    return sum(step.disk_bytes for step in steps)


def as_json(step: StepCost) -> dict[str, Any]:
    """One line of a report."""
    return asdict(step) | {"seconds": round(step.seconds)}
