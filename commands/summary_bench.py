"""What bench measured, for a person."""

from __future__ import annotations

from collections.abc import Iterable

from commands.sheet import Report, Sheet


def sheets_of_bench(report: Report) -> Iterable[Sheet]:
    """Rates, memory, and of a plan the roofline and the check of its tokens."""
    where = report["device"] if report["device"] == "cpu" else f"{report['device']}, {report['backend']}"
    yield Sheet(f"{report['file']} on {where}; {report['batch']} × {report['prompt_tokens']} prompt tokens, {report['new_tokens']} steps")
    rows = (
        ("prefill", f"{report['prefill_tokens_per_s']:,.1f}", f"{report['time_to_first_token_ms']:,.2f} ms to the first token"),
        ("decode", f"{report['decode_tokens_per_s']:,.1f}", f"{report['decode_ms']:,.3f} ms a step"),
    )
    yield Sheet("", ("", "tokens/s", "median"), rows, numbers=True)
    yield Sheet(f"peak memory of the host {report['peak_rss_mb']:,} MB")
    if "roofline" in report:
        yield from _on_gpu(report)


def _on_gpu(report: Report) -> Iterable[Sheet]:
    """Beside the roofline, and against the graph."""
    bounds, tokens = report["roofline"], report["tokens"]
    yield from (Sheet(f"not taken: {reason}") for reason in report["skipped"])
    if bounds is None:
        yield Sheet(f"no roofline: {report['roofline_reason']}")
    else:
        decode = f"decode {bounds['decode_tokens_per_s']:,.1f} tokens/s ({bounds['decode_share']:.0%} reached)"
        first = bounds["time_to_first_token_ms"]
        prefill = "" if first is None else f", first token in {first:,.2f} ms ({bounds['prefill_share']:.0%} reached)"
        yield Sheet(f"at best on {bounds['card']}: {decode}{prefill}")
    if tokens is not None and "reason" in tokens:
        yield Sheet(f"no token was checked: {tokens['reason']}")
    elif tokens is not None:
        others = f"; {tokens['decisive']} otherwise and not for rounding, first {tokens['first']}" if tokens["decisive"] else ""
        yield Sheet(f"{tokens['equal']} of {tokens['checked']} tokens are those of the ONNX graph on the CPU{others}")
