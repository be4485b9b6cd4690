"""A report as a person reads it in a terminal: sheets of plain text and tables, rendered by cli.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from commands.sheet import Report, Sheet, failures, megabytes, number, verdict
from commands.summary_bench import sheets_of_bench
from commands.summary_engines import engine_sheets
from commands.summary_estimate import sheets_of_estimate
from commands.summary_inspect import sheets_of_inspect
from validation.render.bisect import bisect_line


def summarize(command: str, report: Report, *, up_to_date: bool = False) -> list[Sheet]:
    """The sheets of one command's report."""
    sheets = list(_SUMMARIES[command](report))
    return [Sheet("up to date: nothing to do (--force does it anyway)"), *sheets] if up_to_date else sheets


def _export(report: Report) -> Iterable[Sheet]:
    traced = "from a kept trace" if report["trace_cached"] else "traced"
    yield Sheet(
        f"{report['artifact']}: traced.onnx ({report['nodes']} nodes, {traced} in {report['trace_s']:.1f} s), "
        f"{_held(report)}; peak memory {report['peak_rss_mb']} MB"
    )
    if report["audit"]:
        audit = report["audit"]
        counted = f"{audit['duplicated_bytes']:,} bytes are stored twice, {audit['orphaned_bytes']:,} for nothing"
        yield Sheet(f"audit: {audit['compared']} weights are the checkpoint's; {counted}")
    for key, what in (("dropped", "dropped, not a weight"), ("unknown_config_keys", "config key nobody reads"), ("notes", "note")):
        for line in report[key]:
            yield Sheet(f"{what}: {line}")


def _held(report: Report) -> str:
    """What became of the weights."""
    size = megabytes(report["planned_weights_bytes"])
    if report["weights"] == "none":
        return f"the graph alone; its {size} of weights are not written"
    return f"{size} of weights {'used where they lie' if report['weights'] == 'reference' else 'written'} in {report['weights_s']:.1f} s"


def _fuse(report: Report) -> Iterable[Sheet]:
    rows = tuple((rule["rule"], f"{rule['fired']} of {rule['expected']}", *_first_refusal(rule)) for rule in report["rules"])
    if report.get("nothing_to_do"):
        yield Sheet(f"{report['source']}: nothing to do: {report['nothing_to_do']}; nothing is written")
        yield Sheet(report["needs_tensorrt"]["words"])
        return
    name = report.get("out", "fused-onnxruntime.onnx" if report["target"] == "onnxruntime" else "fused.onnx")
    yield Sheet(f"{name}: {report['nodes_before']} → {report['nodes_after']} nodes", ("rule", "fired", "refused", "reason"), rows)
    yield from (Sheet(line) for line in report["layer_operators"]["lines"])
    yield from _one_position(report)
    lowered = ", ".join(f"{operator} {count}" for operator, count in report["lowered"].items())
    yield Sheet(report["needs_tensorrt"]["words"] + (f"; written in older operators: {lowered}" if lowered else ""))


def _one_position(report: Report) -> Iterable[Sheet]:
    """The graph that stands beside one for ONNX Runtime."""
    if "one_position" in report:
        made = report["one_position"]
        yield Sheet(f"{made['file']}: the same with logits of one position a row, to generate with; gathered: {', '.join(made['gathered'])}")


def _first_refusal(rule: Report) -> tuple[str, str]:
    first = rule["refused"][0] if rule["refused"] else {"node": "", "reason": ""}
    return str(len(rule["refused"]) or ""), f"{first['node']} {first['reason']}".strip() or rule.get("note", "")


def _quantize(report: Report) -> Iterable[Sheet]:
    target = f" for {report['target']}" if "target" in report else ""
    yield Sheet(f"{report['scheme']}{target}: {report['quantized']} of {report['linears']} linears quantised, {megabytes(report['bytes'])}")
    if report.get("given"):
        yield Sheet(f"the checkpoint's own integers and scales: {report['given']}")
    elif "calibration" in report:
        yield Sheet(_calibration(report["calibration"]))
    if "output_error" in report and report["output_error"]["chosen"]["mean_rms"] is not None:
        chosen, plain = (report["output_error"][name]["mean_rms"] for name in ("chosen", "plain"))
        yield Sheet(f"mean error of a linear's output: {chosen:.3%}, plain rounding's {plain:.3%}")
    yield from (Sheet(f"{count} linears: blocks of {size}") for size, count in report.get("blocks", {}).items())
    yield from _one_position(report)
    if "placement" in report:
        yield Sheet(_placement(report["placement"]))
    if "w8a8" in report:
        yield Sheet(f"{report['w8a8']['share']:.1%} of the layers' weights multiply int8 by int8 ({report['w8a8']['linears']} linears)")
    yield from (Sheet(f"{count} linears: {form}") for form, count in report.get("formats", {}).items())
    for kept in report["kept"]:
        yield Sheet(f"kept: {kept['name']}: {kept['reason']}")


def _calibration(calibration: Report) -> str:
    if calibration["text"] is None:
        return f"plain rounding, not calibrated: {calibration['reason']}"
    shape = f"{calibration['sequences']} sequences, {calibration['tokens']:,} tokens"
    return f"calibrated on {calibration['text']}: {shape}; {calibration['file']} takes {megabytes(calibration['bytes'])}"


def _placement(placement: Report) -> str:
    chosen = placement["chosen"]
    cost = f"{chosen['increase_pct']:+.2f} ± {chosen['increase_se_pct']:.2f} % of perplexity, KL {chosen['kl']:.2g}"
    tried = f"{len(placement['tries'])} sets measured on {chosen['tokens']:,} tokens of {placement['text']}"
    return f"within {placement['max_perplexity_increase']:g} %: {chosen['share']:.0%} of the bytes that can be saved, {cost}; {tried}"


def _build(report: Report) -> Iterable[Sheet]:
    yield from engine_sheets(report["engines"])
    if "parts_reason" in report:
        yield Sheet(report["parts_reason"])
    for capacity, split in report.get("parts_by_capacity", {}).items():
        yield Sheet(f"capacity {capacity}: {split['parts_reason']}")


def _validate(report: Report) -> Iterable[Sheet]:
    columns = ("stage", "noise", "strict", "local", "range", "KL", "top-1", "ppl %", "gate")
    rows = tuple(
        (
            stage["stage"],
            number(stage["noise_ratio"]),
            number(stage["strict_noise_ratio"]),
            number(stage["worst_local_ratio"]),
            _percent(stage["range_peak"], 0),
            "–" if stage["mean_kl"] is None else f"{stage['mean_kl']:.1e}",
            _percent(stage["top1_agreement"]),
            _increase(stage),
            verdict(stage["passed"]),
        )
        for stage in report["stages"]
    )
    yield Sheet("", columns, rows, numbers=True)
    for stage in report["stages"]:
        yield from failures(stage["stage"], stage["checks"])
        yield from filter(None, [Sheet(line) if (line := bisect_line(stage)) else None])
    if graph := report.get("graph"):
        yield Sheet(f"{graph['file']}: judged as {graph['precision']}: {graph['precision_found']}")
    for failed in (report["checksums"] or {"failed": ()})["failed"]:
        if failed.get("hint"):
            yield Sheet(f"stale: {failed['step']} was made from another {failed['file']}; hint: {failed['hint']}")
        else:
            yield Sheet(f"checksum: {failed.get('tensor') or failed['file']} in {failed['file']} is not what was written")
    yield from _against(report.get("against"))
    yield from _baseline(report.get("baseline"))
    for item in report["not_run"]:
        yield Sheet(f"not run: {item['stage']}: {item['reason']}")
    yield Sheet(f"{report['verdict']} — {report['headline']}")
    if "reports" in report:
        yield Sheet(f"report: {report['reports']}/parity.html")


def _against(found: Report | None) -> Iterable[Sheet]:
    """Whether the reference is what transformers computes."""
    if found and (entry := found.get("entry")):
        yield from failures("the reference", entry["checks"])
        worst = " ".join(f"{name} {entry[name]:.1e}" for name in ("hidden_error", "max_abs_relative", "mean_kl") if entry.get(name) is not None)
        yield Sheet(f"the reference against {found['name']}: {verdict(found['passed'])}; {worst}; weights {found['weights']}")


def _baseline(found: Report | None) -> Iterable[Sheet]:
    """What became worse, in full; the rest is counted."""
    if found:
        yield from failures("worse than the baseline", found["checks"])
        yield Sheet(f"against {found['file']}: {found['words']}")


def _run(report: Report) -> Iterable[Sheet]:
    rows = tuple((step["step"], "done" if step["done"] else "kept", step["reason"]) for step in report["steps"])
    yield Sheet(f"{report['artifact']}: {report['seconds']:.1f} s", ("step", "", "why"), rows)
    yield from engine_sheets([engine for name in report if name.startswith("build-") for engine in report[name]["engines"]])
    yield from _validate(report["validate"])
    yield from (Sheet(f"deleted, because nothing reads it any more: {file}, {megabytes(size)}") for file, size in report["deleted"].items())
    yield Sheet(f"report: {report['artifact']}/reports/parity.html")


def _doctor(report: Report) -> Iterable[Sheet]:
    machine = report["machine"]
    yield Sheet(f"Python {machine['python']}, {machine['cpu_cores']} cores, GPU: {machine['gpu'] or 'none'}")
    if machine["gpu"]:
        yield Sheet(f"plans that run on this GPU are built with --target {' | '.join(machine['targets']) or '… (none)'}")
    yield Sheet(f"memory {machine['memory_available_gib']} of {machine['memory_gib']} GiB free, disk {machine['disk_free_gib']} GiB free")
    yield Sheet(", ".join(f"{name} {version}" for name, version in report["versions"].items() if version))
    hub = report["hub"]
    answer = {None: "not asked (--hub asks)", True: "answers", False: hub["why"]}[hub["reachable"]]
    yield Sheet(f"published models: {hub['cache']}; the hub: {'offline by HF_HUB_OFFLINE' if hub['offline'] else answer}")
    missing = [name for name, version in report["versions"].items() if not version]
    if missing:
        yield Sheet(f"not installed: {', '.join(missing)}")
    rows = tuple((row["what"], row["state"], row["hint"] or "") for row in report["can"])
    yield Sheet("", ("this machine can", "", "how to get it"), rows)


def _increase(stage: Report) -> str:
    """Perplexity's increase over the reference's, ± its standard error."""
    if stage["perplexity_increase_pct"] is None:
        return "–"
    return f"{stage['perplexity_increase_pct']:+.2f}±{stage['perplexity_se_pct']:.2f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


_SUMMARIES: dict[str, Callable[[Report], Iterable[Sheet]]] = {
    "export": _export,
    "fuse": _fuse,
    "quantize": _quantize,
    "build": _build,
    "validate": _validate,
    "bench": sheets_of_bench,
    "run": _run,
    "doctor": _doctor,
    "inspect": sheets_of_inspect,
    "estimate": sheets_of_estimate,
}
