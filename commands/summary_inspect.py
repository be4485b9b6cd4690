"""`inspect` as a person reads it: what it is, what it holds, and the verdict, said first and last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from commands.sheet import Report, Sheet
from commands.summary_estimate import device_sheets

ABOUT = ("path", "kind", "passed", "words", "graphs", "layer_operators", "needs_tensorrt", "runs_here", "why_not_here", "passport", "device")
"""Keys that have lines of their own."""


OUTCOMES = {True: "passed", False: "FAILED", None: "not judged"}


def sheets_of_inspect(report: Report) -> Iterable[Sheet]:
    """The verdict; plain facts, then tables by name; what graphs compute; the verdict again, because a terminal shows the end."""
    verdict = _verdict(report)
    yield Sheet(f"{report['path']}: {report['kind']}{f': {verdict}' if verdict else ''}")
    others = {key: value for key, value in report.items() if key not in ABOUT}
    plain = tuple((key, _plain(value)) for key, value in others.items() if not isinstance(value, (dict, list)))
    if plain:
        yield Sheet("", (), plain)
    for key, value in others.items():
        if isinstance(value, dict) and value:
            yield Sheet(key, (), tuple((str(name), _plain(item)) for name, item in value.items()))
        elif isinstance(value, list) and value:
            yield Sheet(key, (), tuple((_plain(item),) for item in value))
    yield from _graphs(report)
    yield from _plan(report)
    yield from device_sheets(report["device"]) if "device" in report else ()
    if verdict:
        yield Sheet(verdict)


def _plan(report: Report) -> Iterator[Sheet]:
    """Of a plan: what it stands for, by hashes, and whether it runs here."""
    passport = report.get("passport")
    if passport:
        checkpoint, parity = passport["checkpoint"], passport["parity"]
        rows = [("checkpoint", f"{checkpoint['name']} ({checkpoint['source']}), fingerprint {checkpoint['fingerprint']}")]
        rows += [(file, sha256) for file, sha256 in passport["graphs"].items()]
        rows += [(plan["file"], plan["plan_sha256"]) for plan in passport["plans"]]
        rows += [("its content", plan["content_sha256"]) for plan in passport["plans"] if "content_sha256" in plan]
        rows += [("plan bytes", passport["plan_bytes"])] if "plan_bytes" in passport else []
        rows += [("built by", f"{passport['backend']} {passport['tensorrt_version']} for {passport['target']} ({passport['compute_capability']})")]
        rows += [("parity", parity["words"]), *((f"parity of {stage}", OUTCOMES[passed]) for stage, passed in parity.get("stages", {}).items())]
        yield Sheet("passport", (), tuple(rows))
    if "runs_here" in report:
        yield Sheet("runs here: yes" if report["runs_here"] else f"runs here: no: {'; '.join(report['why_not_here'])}")


def _verdict(report: Report) -> str:
    """Of what can be verified, and was."""
    if "passed" not in report:
        return ""
    word = {True: "verified", False: "FAILED", None: "not all could be verified"}[report["passed"]]
    return f"{word}: {report['words']}" if "words" in report else word


def _graphs(report: Report) -> Iterator[Sheet]:
    """What each graph computes its layers with, and what it needs of TensorRT."""
    graphs = report.get("graphs", {report["path"]: report} if "layer_operators" in report else {})
    for file, graph in graphs.items():
        if "unreadable" in graph:
            yield Sheet(f"{file}: {graph['unreadable']}")
            continue
        needs = graph["needs_tensorrt"]["words"]
        yield Sheet(f"{file}: {graph['nodes']:,} nodes; {needs}")
        yield from (Sheet(f"  {line}") for line in graph["layer_operators"]["lines"])


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return "–" if value is None else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
