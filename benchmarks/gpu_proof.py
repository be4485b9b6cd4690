"""What only a GPU can show, on this machine's: plans of both compilers built, run against the reference, timed beside the roofline, written down.

    scripts/gpu-proof                              # or: python -m benchmarks.gpu_proof --checkpoint SRC --out DIR

Each backend gets an artifact of its own below ``--out``. ``proof.json`` holds every command with its whole report, ``proof.md`` the figures, with the
GPU's name. What could not run is listed with its reason; exit code 0 is given only where all ran and matched, 3 where something does not match, 1
where something could not run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifact.engine_names import has_gemv, stage_of, whole_graph
from benchmarks.shapes import ROOT
from engines.backends.flags import DECODE_GEMV, BuildFlags
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.build import STAGES
from engines.cards import card_of
from engines.device import Device, find_device

Report = dict[str, Any]
Cli = Callable[[Sequence[str]], "Ran"]
BATCHES = (1, 4)
FORMED = "fp16"
"""What is also built in the other form of decode: which is faster, and for how many rows, no machine without a GPU can say."""
COLUMNS = ("backend", "precision", "batch", "prefill tokens/s", "of the bound", "decode tokens/s", "of the bound", "tokens as the graph's")


@dataclass(frozen=True)
class Ran:
    """One command: its exit code, its report (None where there is none), what it said on stderr, and its seconds."""

    arguments: tuple[str, ...]
    code: int
    report: Report | None
    error: str
    seconds: float


def run_cli(arguments: Sequence[str]) -> Ran:
    """``cli.py … --json`` in a process of its own."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "cli.py", *arguments, "--json"], cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        report = None
    words = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    return Ran(tuple(arguments), done.returncode, report, " ".join(words), round(time.perf_counter() - start, 1))


@dataclass(frozen=True)
class Proof:
    """What is proven on what."""

    checkpoint: str
    out: Path
    target: str
    precisions: tuple[str, ...]
    backends: tuple[str, ...]
    cli: Cli = run_cli


def prove(proof: Proof) -> list[Ran]:
    """Every command in turn; a backend whose engines could not be built is not asked for more."""
    return [ran for backend in proof.backends for ran in _prove_backend(proof, backend)]


def _prove_backend(proof: Proof, backend: str) -> Iterator[Ran]:
    artifact = str(proof.out / backend)
    precisions = [word for precision in proof.precisions for word in ("--precision", precision)]
    options = ["--backend", backend, "--target", proof.target, "--max-batch", str(max(BATCHES))]
    built = proof.cli(["run", "--checkpoint", proof.checkpoint, *precisions, *options, "--out", artifact])
    yield built
    if built.report is None:
        return
    yield proof.cli(["validate", artifact, "--device", "cuda"])
    for precision in proof.precisions:
        yield from _time(proof, artifact, _graph(built.report[f"build-{precision}"]))
    if backend != TensorRTRTX.name or FORMED not in proof.precisions:
        return
    usual = has_gemv(_graph(built.report[f"build-{FORMED}"]))
    again = proof.cli(["build", artifact, "--precision", FORMED, *options, *BuildFlags(decode_gemv=not usual).asked()])
    yield again
    if again.report is not None:
        yield proof.cli(["validate", artifact, "--stage", STAGES[FORMED], "--device", "cuda"])
        yield from _time(proof, artifact, _graph(again.report))


def _graph(build: Report) -> str:
    """The engine graph that a build reported; as a stage it asks for the plan that was built from it."""
    return whole_graph(build["engines"][0]["graph"]).removesuffix(".onnx")


def _time(proof: Proof, artifact: str, stage: str) -> Iterator[Ran]:
    for batch in BATCHES:
        yield proof.cli(["bench", artifact, "--stage", stage, "--device", "cuda", "--batch", str(batch)])


def exit_code(commands: Sequence[Ran]) -> int:
    """0 where all ran and matched, 3 where something does not match, 1 where something did not run; a plan that is listed as not run did not."""
    if any(ran.code == 3 for ran in commands):
        return 3
    left_out = any(_not_run(ran) for ran in commands)
    return 1 if not commands or left_out or any(ran.code for ran in commands) else 0


def _not_run(ran: Ran) -> list[str]:
    """The plans that a validation on the GPU left out, with their reasons."""
    if ran.arguments[0] != "validate" or ran.report is None:
        return []
    return [f"{one['stage']}: {one['reason']}" for one in ran.report["not_run"] if one["stage"].startswith("engine ")]


def describe(gpu: str, versions: Report, commands: Sequence[Ran]) -> str:
    """``proof.md``."""
    rows = [" | ".join(_figures(ran)) for ran in commands if ran.arguments[0] == "bench" and ran.report]
    judged = [(ran.arguments[1], ran.report) for ran in commands if ran.arguments[0] == "validate" and ran.report]
    verdicts = [f"- `{artifact}`: {report['verdict']}; {report['headline']}" for artifact, report in judged]
    failed = [f"- `{' '.join(ran.arguments)}`: exit code {ran.code}; {ran.error or 'no word on stderr'}" for ran in commands if ran.code]
    missing = [f"- {reason}" for ran in commands for reason in _not_run(ran)]
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version and name.startswith(("tensorrt", "polygraphy", "torch")))
    parts = [
        f"# Run on {gpu}\n\n{known}",
        "## Speed\n\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS) + "\n" + "\n".join(f"| {row} |" for row in rows),
        "## Against the reference\n\n" + ("\n".join(verdicts) or "not run"),
        "## Not run, or failed\n\n" + ("\n".join([*missing, *failed]) or "nothing"),
    ]
    return "\n\n".join(parts) + "\n"


def _figures(ran: Ran) -> list[str]:
    report = ran.report or {}
    bounds, tokens = report["roofline"] or {}, report["tokens"] or {}
    shares = [f"{bounds[key]:.0%}" if bounds.get(key) else "–" for key in ("prefill_share", "decode_share")]
    precision = next(name for name, stage in STAGES.items() if stage == stage_of(report["stage"])) + f" {DECODE_GEMV}" * has_gemv(report["stage"])
    same = f"{tokens['equal']} of {tokens['checked']}" if tokens else "–"
    prefill, decode = (f"{report[f'{kind}_tokens_per_s']:,.0f}" for kind in ("prefill", "decode"))
    return [report["backend"], precision, str(report["batch"]), prefill, shares[0], decode, shares[1], same]


def main() -> None:
    """Prove, write, say in the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--target", default="", help="default: the card that is here")
    parser.add_argument("--out", type=Path, default=Path("proof"))
    parser.add_argument("--precisions", default="fp16 int8")
    parser.add_argument("--backends", default="tensorrt tensorrt-rtx")
    given = parser.parse_args()
    device = find_device()
    card = card_of(device) if isinstance(device, Device) else None
    if not isinstance(device, Device):
        sys.exit(f"error: nothing can be proven here: {device}\nhint: run it on a machine with the plans' GPU")
    if not given.target and card is None:
        sys.exit(f"error: no target is {device.name}\nhint: --target names one of its compute capability; python cli.py doctor lists them")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    target = given.target or (card.name if card else "")
    commands = prove(Proof(given.checkpoint, out, target, tuple(given.precisions.split()), tuple(given.backends.split())))
    versions = (run_cli(["doctor"]).report or {}).get("versions", {})
    record = {"gpu": device.name, "versions": versions, "commands": [vars(ran) for ran in commands]}
    (out / "proof.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "proof.md").write_text(describe(device.name, versions, commands), encoding="utf-8")
    print(out / "proof.md")
    sys.exit(exit_code(commands))


if __name__ == "__main__":
    main()
