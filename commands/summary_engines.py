"""Engines as a person reads them: a line a plan, what each profile runs, whether it fits its GPU, and what did not hold."""

from __future__ import annotations

from collections.abc import Iterable

from commands.sheet import Report, Sheet, failures, megabytes, verdict
from commands.summary_estimate import device_sheets
from engines.plan_words import layer_lines


def engine_sheets(engines: list[Report]) -> Iterable[Sheet]:
    """The sheets of some plans."""
    columns = ("engine", "plan", "built in", "memory at most", "bytes/weight", "audit")
    rows = tuple(
        (
            f"{engine['target']} {engine['precision']}{_form(engine)}{_part(engine)}",
            megabytes(engine["bytes"]),
            f"{engine['build_s']:.1f} s",
            f"{engine['peak_anonymous_mb']:,} MB",
            "–" if engine["bytes_per_weight"] is None else f"{engine['bytes_per_weight']:.3f}",
            verdict(engine["audit"]["passed"]),
        )
        for engine in engines
    )
    yield Sheet("", columns, rows, numbers=True)
    for engine in engines:
        lines = layer_lines(engine["kernels_by_layer"])
        kernels = tuple((line.profile, line.layers, str(line.kernels), line.content) for line in lines)
        yield Sheet(engine["file"], ("profile", "where", "kernels", "in order"), kernels)
        yield from (Sheet(f"{engine['file']}: {note}") for note in engine["notes"])
        yield from failures(engine["file"], engine["audit"]["checks"])
        yield from _unread(engine)
        if engine["part"] == 0:
            yield from device_sheets(engine["device"])


def _form(engine: Report) -> str:
    """Of two engines of one precision, which."""
    return " gemv" if (engine.get("flags") or {}).get("decode_gemv") else ""


def _unread(engine: Report) -> Iterable[Sheet]:
    """Of an audit that is no verdict: why."""
    if engine["audit"]["passed"] is None:
        line = next(line for line in engine["audit"]["checks"] if line["passed"] is None)
        yield Sheet(f"{engine['file']}: {line['check']} is {line['value']} of {line['limit']} {line['reason']}")


def _part(engine: Report) -> str:
    """Which layers, where they are not all."""
    first, last = engine["layers"]
    return "" if {"input_ids", "logits"} <= {*engine["inputs"], *engine["outputs"]} else f", layers {first}–{last}"
