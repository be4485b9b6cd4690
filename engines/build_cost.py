"""What building one plan takes: anonymous memory at its peak, bytes of the plan, seconds. The one place that predicts them.

Fitted to builds with TensorRT-RTX 1.7.1, two profiles, packed graphs; `benchmarks/build_prediction.py` builds them again and prints the ratios.
Unpacked graphs keep two layouts of q·k·v and gate·up in a plan with two profiles (docs/adr/005), and are bounded from above only.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.form_limits import GEMV_LAYER_TEXT, QUANTIZED_TYPES

MEGABYTE = 10**6


@dataclass(frozen=True)
class Fit:
    """One line: ``base + layer · L + weight · bytes``."""

    base: int
    layer: int
    weight: float = 1.0

    def at(self, weights_bytes: int, layers: int) -> int:
        """Bytes."""
        return self.base + self.layer * layers + int(self.weight * weights_bytes)


MEMORY = Fit(336 * MEGABYTE, 2_000_000)
PLAN = {False: Fit(2_990_000, 373_000), True: Fit(2_440_000, 975_000)}
"""By whether weights are quantised: a plan is its weights and text, which depends on the layers and not on their width."""
TURNED = {"int4": 1.4, "int8-smoothquant": 1.0}
"""Precision → copies that the compiler makes of levels that lie as [out, in]; it wants them as [in, out], as int8 has them (docs/adr/022)."""
PARENT_BYTES = 130 * MEGABYTE
"""The process that waits for the compiler and audits the plan."""
UNPACKED = 1.75
ADDED_STATIC_TEXT = 330_000
"""What a static cache adds to each layer's text (docs/adr/009)."""
ADDED_QUANTIZED_MEMORY = 1_000_000
"""What quantised weights add a layer."""
ADDED_GEMV_MEMORY = 550_000
"""What a decode that multiplies by a vector adds a layer; to the plan it adds ``GEMV_LAYER_TEXT``."""
SECONDS, SECONDS_A_LAYER, BYTES_A_SECOND = 5.0, 0.27, 300e6
"""13 s for SmolLM2 and 58 s for 7B FP16 and 13B INT8, on two cores that do nothing else."""


@dataclass(frozen=True)
class Graph:
    """What is built, as far as its cost depends on it.

    Attributes:
        weights_bytes: of the graph, tied weights once.
        layers: decoder layers.
        precision: of the engine.
        turned_bytes: of the weights, levels that lie as [out, in].
        packed: q·k·v and gate·up are one linear each.
        static: the cache is written in place.
        gemv: decode multiplies by a vector.
    """

    weights_bytes: int
    layers: int
    precision: str
    turned_bytes: int = 0
    packed: bool = True
    static: bool = False
    gemv: bool = False


@dataclass(frozen=True)
class BuildCost:
    """What one plan takes.

    Attributes:
        compiler_bytes: anonymous memory of the compiler's process, which is what was measured.
        plan_bytes: of the file.
        seconds: on two cores.
    """

    compiler_bytes: int
    plan_bytes: int
    seconds: float

    @property
    def memory_bytes(self) -> int:
        """Of both processes; cuts, checks and estimates all go by it."""
        return self.compiler_bytes + PARENT_BYTES


def build_cost(graph: Graph) -> BuildCost:
    """What building it will take; the weights' own map comes on top of the memory, but can be given back."""
    quantized, factor = graph.precision in QUANTIZED_TYPES, 1.0 if graph.packed else UNPACKED
    weights = int(factor * graph.weights_bytes)
    text = graph.static * ADDED_STATIC_TEXT * graph.layers
    seconds = SECONDS + SECONDS_A_LAYER * graph.layers + weights / BYTES_A_SECOND
    added = quantized * ADDED_QUANTIZED_MEMORY * graph.layers
    memory = MEMORY.at(weights, graph.layers) + added + int(TURNED.get(graph.precision, 1.0) * graph.turned_bytes)
    if graph.gemv:
        memory, text = memory + ADDED_GEMV_MEMORY * graph.layers, text + GEMV_LAYER_TEXT * graph.layers
    return BuildCost(memory, PLAN[quantized].at(weights, graph.layers) + text, round(seconds, 1))
