"""What `quantize` takes before it rounds, where linears are chosen within a limit on perplexity: smoothing, sensitivity, placement.

Letters: L decoder layers, S sites a layer, E hidden, V vocab.
"""

from __future__ import annotations

from math import prod

from artifact.config import LlamaConfig
from artifact.io_spec import DTYPE_BYTES
from artifact.layout import PACKED, linear_shapes
from engines.step_cost import DRIVEN_WEIGHTS_S, REFERENCE, Rates, StepCost, layer_float32, torch_memory
from engines.weight_sizes import linear_parameters

SITES = 4
"""Of a layer: what enters q·k·v, o, gate·up and down."""
FOLDS, TRIES, ROWS, OUTPUTS = 4, 29, 200, 192
"""Of smoothing: parts of the text, pairs of exponent and headroom, rows and outputs that a try is judged on (graphs/quantize/smoothing.py)."""
SCORED_TOKENS, STATE_BYTES = 512, 1 << 30
"""Of sensitivity: tokens that each linear is scored on, half of them compared, and states that go on together (validation/sensitivity.py)."""
SETS, SET_TOKENS = 7, 4096
"""Of placement: sets that are measured at most, and tokens of each (graphs/quantize/placement.py, validation/placement_text.py)."""
STATES_AT_ONCE = 2
"""A state, and what becomes of it."""


def placement_costs(config: LlamaConfig, rates: Rates = REFERENCE) -> list[StepCost]:
    """The three, in order; where another limit is asked for, only the last is done again."""
    return [smoothing_cost(config, rates), sensitivity_cost(config, rates), placement_cost(config, rates)]


def site_channels(config: LlamaConfig) -> int:
    """Channels of every input that linears read, those of one input once."""
    members = {linear for packed in PACKED.values() for linear in packed[1:]}
    return config.num_hidden_layers * sum(shape[1] for name, shape in linear_shapes(config).items() if name not in members)


def smoothing_cost(config: LlamaConfig, rates: Rates = REFERENCE) -> StepCost:
    """Every site's exponent and headroom, on rows of the parts of the text."""
    flop = 2 * site_channels(config) * FOLDS * TRIES * ROWS * OUTPUTS
    return _cost(config, "smoothing", flop, rates, 2 * layer_float32(config), f"{FOLDS * TRIES} tries of {SITES} sites a layer")


def sensitivity_cost(config: LlamaConfig, rates: Rates = REFERENCE) -> StepCost:
    """Every linear rounded alone, through all layers behind it: half the linears times the depth."""
    depth = config.num_hidden_layers
    runs = SITES * depth * (depth + 1) // 2
    compared = SITES * depth * config.vocab_size * config.hidden_size / 2
    flop = 2 * SCORED_TOKENS * (runs * linear_parameters(config) / depth + compared)
    states = STATES_AT_ONCE * min(STATE_BYTES, SITES * depth * SCORED_TOKENS * config.hidden_size * DTYPE_BYTES["fp32"])
    return _cost(config, "sensitivity", flop, rates, layer_float32(config) + states, f"{runs:,} runs of a layer, {flop / 1e12:,.0f} TFLOP")


def placement_cost(config: LlamaConfig, rates: Rates = REFERENCE) -> StepCost:
    """Sets of linears run whole; each linear is rounded once for all of them, in both of its forms."""
    compared = 2 * config.vocab_size * config.hidden_size
    flop = SETS * 2 * SET_TOKENS * (linear_parameters(config) + compared)
    rounding = 2 * linear_parameters(config) / (DRIVEN_WEIGHTS_S * rates.gflops / REFERENCE.gflops)
    states = STATES_AT_ONCE * SET_TOKENS * config.hidden_size * DTYPE_BYTES["fp32"]
    words = f"at most {SETS} sets on {SET_TOKENS:,} tokens, each linear rounded in two forms"
    return _cost(config, "placement", flop, rates, layer_float32(config) + states, words, more_s=rounding)


def _cost(config: LlamaConfig, step: str, flop: float, rates: Rates, extra_bytes: int, words: str, *, more_s: float = 0.0) -> StepCost:
    head = prod((config.vocab_size, config.hidden_size, DTYPE_BYTES["fp32"]))
    return StepCost(step, torch_memory(config) + head + extra_bytes, 0, 5 + flop / (rates.gflops * 1e9) + more_s, words)
