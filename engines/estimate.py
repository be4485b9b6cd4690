"""What a model, a precision and a GPU take, before anything is started: every step on this machine, the GPU's memory, and the bounds of speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.io_spec import KvCache
from artifact.layout import parameter_count
from artifact.room import gigabytes
from engines.build_cost import BuildCost, build_cost
from engines.decode_form import suits
from engines.device_fit import Load, fit
from engines.part_plan import Limits, PartPlan, part_graph, plan_usual
from engines.profiles import TYPICAL_LENGTH, default_length
from engines.roofline import DECODE_SHARE, PREFILL_SHARE, compare, roofline
from engines.step_cost import Rates, StepCost
from engines.step_costs import DOWNLOAD, Work, as_json, disk_total, step_costs
from engines.targets import TARGETS, Target
from engines.weight_sizes import check_blocks, weight_sizes

PRECISIONS = ("fp16", "int8", "int8-smoothquant", "int4")
"""What is compared."""
LONG_PROMPT = 2048
USUAL_TARGETS, USUAL_PRECISIONS, USUAL_ROWS = ("a100-40gb", "a100-80gb"), ("fp16", "int8"), 4
"""What `inspect` says of a model; a build's own options are in its build.json."""
TIMES = "times are of the order of magnitude: they scale with the two rates, and other work on the machine makes them longer"


@dataclass(frozen=True)
class Machine:
    """What is free here, and how fast it is.

    Attributes:
        memory_bytes: available.
        disk_bytes: free where the artifact goes.
        rates: measured.
        cache_disk_bytes: free where a download goes; None: that is the artifact's disk.
    """

    memory_bytes: int
    disk_bytes: int
    rates: Rates
    cache_disk_bytes: int | None = None


@dataclass(frozen=True)
class Question:
    """What is asked about.

    Attributes:
        config: of the model.
        load: what the engine is used for.
        target: the GPU.
        calibrated: whether a scheme that looks at activations may.
        max_memory: bytes that a build may take; None: what is free.
        packed: whether its graph's linears can be packed.
        download_bytes: of a checkpoint that is not here.
        done: steps that an artifact has behind it.
    """

    config: LlamaConfig
    load: Load
    target: Target
    calibrated: bool = True
    max_memory: int | None = None
    packed: bool = True
    download_bytes: int = 0
    done: frozenset[str] = frozenset()


def estimate(question: Question, machine: Machine) -> dict[str, Any]:
    """Answer a question for a machine.

    Raises:
        EngineError: INT4, and rows that can't be cut into blocks.

    Returns:
        ``parameters``, ``weights_bytes``; ``steps`` [{step, memory_bytes, disk_bytes, seconds, assumption}], ``disk_bytes``, ``seconds``;
        ``done``: steps;
        ``parts`` {count, layers, reason}; ``lacks`` [words of what does not fit this machine, with what would]; ``device`` (``device_report``);
        ``machine``; ``fits``: whether all of it does, here and on the GPU.
    """
    config, load = question.config, question.load
    check_blocks(config, load.precision)
    device = device_report(config, load, question.target)
    cut, gemv, refused = _parts(question, machine, device["fit"]["gpus"])
    steps = step_costs(config, _work(question, machine, cut, gemv=gemv), machine.rates)
    lacks = [*([refused] if refused else []), *_lacks(steps, machine)]
    return {
        "parameters": parameter_count(config),
        "precision": load.precision,
        "max_batch": load.batch,
        "max_length": load.length,
        "kv_cache": load.kv_cache,
        "weights_bytes": weight_sizes(config, load.precision).total,
        "steps": [as_json(step) for step in steps],
        "done": sorted(question.done),
        "peak_memory_bytes": max(step.memory_bytes for step in steps),
        "disk_bytes": disk_total(steps),
        "seconds": round(sum(step.seconds for step in steps)),
        "times": TIMES,
        "parts": {"count": len(cut.layers), "layers": [list(layers) for layers in cut.layers], "reason": cut.reason},
        "device": device,
        "machine": {"memory_bytes": machine.memory_bytes, "disk_bytes": machine.disk_bytes, **machine.rates.as_json()},
        "lacks": lacks,
        "fits": not lacks and device["fit"]["fits"],
    }


def _work(question: Question, machine: Machine, cut: PartPlan, *, gemv: bool) -> Work:
    """What the steps have to do."""
    return Work(
        question.load.precision,
        question.load.kv_cache,
        calibrated=question.calibrated,
        packed=question.packed,
        plans=_plans(question, cut, gemv=gemv),
        download_bytes=question.download_bytes,
        done=question.done,
        free_bytes=machine.memory_bytes,
    )


def device_report(config: LlamaConfig, load: Load, target: Target) -> dict[str, Any]:
    """Of one engine on one GPU: does it fit (``fit``), the bounds of speed (``roofline``), and precisions compared (``faster``).

    A static cache is read up to its capacity at each step, however much of it is used (docs/adr/027).

    Args:
        config: of the model.
        load: what it is used for.
        target: the GPU.
    """
    prompt, static = min(LONG_PROMPT, load.length), load.kv_cache == "static"
    usual, typical = (load.length, load.length) if static else (prompt, min(TYPICAL_LENGTH, prompt))
    words = f"{usual:,} tokens of capacity read" if static else f"{usual:,} tokens cached"
    shapes = {} if static else {"one row, empty cache": (1, 0)}
    shapes |= {f"one row, {words}": (1, usual), f"{load.batch} rows, {words}": (load.batch, usual)}
    bounds = {words: roofline(config, load.precision, target, batch=batch, prompt=prompt, cached=cached) for words, (batch, cached) in shapes.items()}
    return {
        "fit": fit(config, load, target),
        "roofline": {words: bound.as_json() for words, bound in bounds.items()},
        "prompt_tokens": prompt,
        "reached": {"decode": list(DECODE_SHARE), "prefill": list(PREFILL_SHARE)},
        "faster": [_compared(config, precision, target, prompt, typical) for precision in PRECISIONS],
        "note": target.note,
    }


def fits_on(config: LlamaConfig, kv_cache: KvCache = "dynamic") -> dict[str, str]:
    """`a100-40gb fp16` … → whether the model fits it at a build's defaults, in words."""
    length = default_length(config)
    return {
        f"{name} {precision}": fit(config, Load(precision, USUAL_ROWS, length, kv_cache), TARGETS[name])["words"]
        for name in USUAL_TARGETS
        for precision in USUAL_PRECISIONS
    }


def _compared(config: LlamaConfig, precision: str, target: Target, prompt: int, cached: int) -> dict[str, Any]:
    """One row; a precision that the widths forbid has a reason in the place of factors."""
    try:
        check_blocks(config, precision)
        return compare(config, precision, target, batch=1, prompt=prompt, cached=cached)
    except EngineError as error:
        return {"precision": precision, "decode": None, "prefill": None, "why": str(error)}


def _parts(question: Question, machine: Machine, gpus: int | None) -> tuple[PartPlan, bool, str]:
    """The cut that fits, the form of its decode, and no words; or one part a layer, and why even that does not."""
    limits = Limits.of(None, question.max_memory, gpus=gpus, target=question.target.name, free=machine.memory_bytes)
    form = {"packed": question.packed, "static": question.load.kv_cache == "static"}
    gemv = suits(question.config, question.load, question.target, packed=question.packed)
    try:
        return *plan_usual(question.config, question.load.precision, limits, gemv=gemv, **form), ""
    except EngineError as error:
        count = question.config.num_hidden_layers
        return PartPlan(tuple((layer, layer) for layer in range(count)), "no cut fits"), False, f"build: {error}"


def _plans(question: Question, cut: PartPlan, *, gemv: bool) -> tuple[BuildCost, ...]:
    config, precision = question.config, question.load.precision
    sizes, form = weight_sizes(config, precision), {"packed": question.packed, "static": question.load.kv_cache == "static", "gemv": gemv}
    return tuple(build_cost(part_graph(sizes, part, precision, **form, tied=config.tie_word_embeddings)) for part in cut.layers)


def _lacks(steps: list[StepCost], machine: Machine) -> list[str]:
    """What this machine has too little of; whether it can build, the cut has said, by the limit that the build itself goes by."""
    lacks = [
        f"{step.step}: about {gigabytes(step.memory_bytes)} of memory, {gigabytes(machine.memory_bytes)} are free"
        for step in steps
        if step.memory_bytes > machine.memory_bytes and step.step != "build"
    ]
    apart = [step for step in steps if step.step == DOWNLOAD and machine.cache_disk_bytes is not None]
    cached, needed = disk_total(apart), disk_total([step for step in steps if step not in apart])
    if machine.cache_disk_bytes is not None and cached > machine.cache_disk_bytes:
        lacks.append(f"disk of the hub's cache: about {gigabytes(cached)}, {gigabytes(machine.cache_disk_bytes)} are free; HF_HUB_CACHE moves it")
    if needed > machine.disk_bytes:
        weights = sum(step.disk_bytes for step in steps if step.step == "export")
        less = f"; --weights reference of a float16 checkpoint saves {gigabytes(weights)}" if weights else ""
        lacks.append(f"disk: about {gigabytes(needed)}, {gigabytes(machine.disk_bytes)} are free{less}")
    return lacks
