"""`estimate` as a person reads it: the verdict, the steps, the GPU, and how fast it can be; and the device lines that `build` shows too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from artifact.room import gigabytes
from commands.sheet import Report, Sheet


def sheets_of_estimate(report: Report) -> Iterable[Sheet]:
    """What is asked about; a line a step; what is lacking; the GPU; speed."""
    shape = f"{report['max_batch']} rows of {report['max_length']:,} tokens, {report['kv_cache']} cache"
    yield Sheet(f"{report['model']}, {report['parameters'] / 1e9:.2f} billion parameters, {report['precision']}: {shape}")
    if report["download_bytes"]:
        yield Sheet(f"to download first: about {gigabytes(report['download_bytes'])}, into the hub's cache")
    if report["done"]:
        yield Sheet(f"done already: {', '.join(report['done'])}")
    rows = tuple(
        (step["step"], gigabytes(step["memory_bytes"]), gigabytes(step["disk_bytes"]), _duration(step["seconds"]), step["assumption"])
        for step in report["steps"]
    )
    total = ("all", gigabytes(report["peak_memory_bytes"]), gigabytes(report["disk_bytes"]), _duration(report["seconds"]), "")
    yield Sheet("", ("step", "peak memory", "disk", "time", "assumed"), (*rows, total))
    machine = report["machine"]
    free = f"free here: {gigabytes(machine['memory_bytes'])} of memory, {gigabytes(machine['disk_bytes'])} of disk"
    yield Sheet(f"{free}; measured: {machine['disk_gb_s']:.2f} GB/s to disk, {machine['gflops']:.0f} GFLOP/s")
    yield Sheet(report["times"])
    yield Sheet(f"plans: {report['parts']['reason']}")
    yield from (Sheet(f"does not fit here: {lack}") for lack in report["lacks"])
    yield from device_sheets(report["device"])
    yield from _faster(report["device"])


def device_sheets(device: Report) -> Iterator[Sheet]:
    """Whether the engine fits its GPU, what would, and the bounds of its speed."""
    fit = device["fit"]
    yield Sheet(fit["words"])
    if fit["instead"]:
        yield Sheet(f"what fits: {'; or '.join(fit['instead'])}")
    rows = tuple(
        (
            words,
            f"{bound['decode_tokens_per_s']:,.0f}",
            f"{bound['decode_step_ms']:,.2f} ms",
            "–" if bound["time_to_first_token_ms"] is None else f"{bound['time_to_first_token_ms']:,.1f} ms",
        )
        for words, bound in device["roofline"].items()
    )
    first = f"first token of {device['prompt_tokens']:,}"
    yield Sheet(f"{fit['target']} at best", ("", "decode tokens/s", "a step", first), rows, numbers=True)
    decode, prefill = (" to ".join(f"{share:.0%}" for share in device["reached"][name]) for name in ("decode", "prefill"))
    small = "; below some billion parameters a step is its launches: SmolLM2's took 3 ms on an H200"
    yield Sheet(f"published A100 figures of Llama 2 reach {decode} of the decode bound, {prefill} of prefill's{small}")
    if device["note"]:
        yield Sheet(f"{fit['target']}: {device['note']}")


def _faster(device: Report) -> Iterator[Sheet]:
    rows = tuple((line["precision"], _factor(line["decode"]), _factor(line["prefill"]), line["why"]) for line in device["faster"])
    yield Sheet("faster than fp16 at best (one row)", ("precision", "decode", "prefill", "why"), rows)


def _factor(value: float | None) -> str:
    return "–" if value is None else "as fast" if value == 1 else f"{value:.2f} ×"


def _duration(seconds: float) -> str:
    """A time of which only the order is known."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
