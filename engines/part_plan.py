"""Into how many parts a model is cut for its plans, and where: the fewest whose build fits the memory, and that fit their GPUs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.room import free_memory, gigabytes
from engines.build_cost import Graph, build_cost
from engines.device_fit import ONE_GPU
from engines.weight_sizes import WeightSizes, weight_sizes

Layers = tuple[int, int]
"""First and last, both inside."""


@dataclass(frozen=True)
class PartPlan:
    """The layers of each part, and why there are so many."""

    layers: tuple[Layers, ...]
    reason: str


@dataclass(frozen=True)
class Limits:
    """What a part must fit.

    Attributes:
        parts: how many were asked for; None: as many as are needed.
        memory_bytes: that building one may take.
        memory_words: what that number is: `--max-memory 8 GB`, `9.5 GB of free memory`.
        gpus: that the device fit says are needed, each with a part of its own; None: it fits no number of them.
    """

    parts: int | None
    memory_bytes: int
    memory_words: str
    gpus: int | None = 1
    target: str = ""

    @classmethod
    def of(cls, parts: int | None, max_memory: int | None, *, gpus: int | None, target: str, free: int | None = None) -> Limits:
        """Limits as asked for: ``--parts``, and ``--max-memory`` or what is free (``free``; None asks the machine)."""
        found = free_memory() if free is None else free
        if max_memory is not None:
            more = f", though {gigabytes(found)} are free" if max_memory > found else ""
            return cls(parts, max_memory, f"--max-memory {gigabytes(max_memory)}{more}", gpus, target)
        return cls(parts, found, f"{gigabytes(found)} of free memory", gpus, target)


def plan_parts(
    config: LlamaConfig,
    precision: str,
    limits: Limits,
    *,
    packed: bool = True,
    static: bool = False,
    gemv: bool = False,
    begun: tuple[Layers, ...] = (),
    scale: float = 1.0,
) -> PartPlan:
    """Cut a model at layer boundaries.

    Args:
        config: of the model.
        precision: of the engine.
        limits: what each part must fit.
        packed, static, gemv: form of the graph.
        scale: weights of the graph at hand ÷ those that its precision comes to: above 1 where linears are kept out of it.
        begun: the parts of a build that was interrupted; taken again where they fit.

    Raises:
        EngineError: more parts than layers are asked for, or even one layer alone does not fit.
    """
    layers, sizes = config.num_hidden_layers, weight_sizes(config, precision)

    def memory(part: Layers) -> int:
        graph = part_graph(sizes, part, precision, packed=packed, static=static, gemv=gemv, tied=config.tie_word_embeddings)
        return build_cost(replace(graph, weights_bytes=int(scale * graph.weights_bytes))).memory_bytes

    if limits.parts is not None:
        if not 1 <= limits.parts <= layers:
            raise EngineError(f"--parts {limits.parts}: the model has {layers} layers, and a part has one at least", hint="--parts auto")
        cut = split(sizes, limits.parts, tied=config.tie_word_embeddings)
        _check(max(map(memory, cut)), limits, limits.parts)
        return PartPlan(cut, f"--parts {limits.parts}{_unfit(limits)}")
    whole = memory((0, layers - 1))
    least = limits.gpus or 1
    if len(begun) >= least and begun and begun[-1][1] == layers - 1 and max(map(memory, begun)) <= limits.memory_bytes:
        again = f"{len(begun)} parts, as an interrupted build had begun{_unfit(limits)}"
        return PartPlan(begun, again if len(begun) > 1 else _reason(1, whole, limits))
    for count in range(least, layers + 1):
        cut = split(sizes, count, tied=config.tie_word_embeddings)
        if max(map(memory, cut)) <= limits.memory_bytes:
            return PartPlan(cut, _reason(count, whole, limits))
    _check(max(map(memory, split(sizes, layers, tied=config.tie_word_embeddings))), limits, layers)
    raise AssertionError("unreachable: the last check refuses")


def plan_usual(config: LlamaConfig, precision: str, limits: Limits, *, gemv: bool, **form: Any) -> tuple[PartPlan, bool]:
    """The cut of an engine, and whether its decode multiplies by a vector: not where that was to be and does not fit one plan.

    Args:
        config, precision, limits: as ``plan_parts``.
        gemv: whether it is to be.
        form: what else ``plan_parts`` takes.

    Raises:
        EngineError: as ``plan_parts``.
    """
    with suppress(EngineError):  # what has room for no such plan may have it for the other
        if gemv and len((cut := plan_parts(config, precision, limits, gemv=True, **form)).layers) == 1:
            return cut, True
    return plan_parts(config, precision, limits, **form), False


def part_graph(sizes: WeightSizes, part: Layers, precision: str, *, packed: bool, static: bool, tied: bool, gemv: bool = False) -> Graph:
    """What a part's build depends on; the whole is the part of all layers."""
    count = part[1] - part[0] + 1
    return Graph(sizes.of_part(*part, tied=tied), count, precision, count * sizes.turned, packed, static, gemv)


def split(sizes: WeightSizes, count: int, *, tied: bool) -> tuple[Layers, ...]:
    """Runs of layers whose largest part is as small as can be; the ends carry the embedding and lm_head, so they may have fewer layers."""
    low, high = sizes.layer, sizes.total + sizes.embedding
    while low < high:  # the smallest bound under which the layers go into so many parts
        middle = (low + high) // 2
        low, high = (low, middle) if len(_greedy(sizes, middle, tied=tied)) <= count else (middle + 1, high)
    found = _greedy(sizes, low, tied=tied)
    while len(found) < count:  # parts that the bound does not need: halve the longest
        at = max(range(len(found)), key=lambda index: found[index][1] - found[index][0])
        first, last = found[at]
        found[at : at + 1] = [(first, (first + last) // 2), ((first + last) // 2 + 1, last)]
    return tuple(found)


def _greedy(sizes: WeightSizes, bound: int, *, tied: bool) -> list[Layers]:
    """As many layers in each part as a bound allows, one at least."""
    parts, first = list[Layers](), 0
    while first < sizes.layers:
        last = first
        while last + 1 < sizes.layers and sizes.of_part(first, last + 1, tied=tied) <= bound:
            last += 1
        parts.append((first, last))
        first = last + 1
    return parts if all(sizes.of_part(*part, tied=tied) <= bound for part in parts) else parts + [(0, 0)] * sizes.layers


def _reason(count: int, whole: int, limits: Limits) -> str:
    needs = f"building the whole takes about {gigabytes(whole)}"
    if count == 1:
        return f"one plan: {needs}, within {limits.memory_words}{_unfit(limits)}"
    if count == limits.gpus:
        return f"{count} parts: {limits.target} needs {count} GPUs, one part each{_unfit(limits)}"
    return f"{count} parts: {needs}, more than {limits.memory_words}{_unfit(limits)}"


def _unfit(limits: Limits) -> str:
    """What else is to be known of an engine that its GPU does not hold."""
    if limits.gpus is None:
        return f"; it fits {limits.target} in no number of parts"
    return f"; {ONE_GPU}, and {limits.target} does not hold the whole" if limits.gpus > 1 else ""


def _check(largest: int, limits: Limits, count: int) -> None:
    if largest > limits.memory_bytes:
        what = "the build" if count == 1 else f"the largest of {count} parts"
        raise EngineError(
            f"{what} needs about {gigabytes(largest)} of memory, more than {limits.memory_words}",
            hint="--parts auto cuts it to fit" if limits.parts is not None else "end other programs, or use a machine with more",
        )
