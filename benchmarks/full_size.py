"""A model of full size from nothing to its parity report, without a GPU: `python benchmarks/full_size.py [7b] [--precision int8] [--build]`.

Random weights. Each step is a process of its own; its seconds, and the peak of its anonymous memory, are held against the limits: 30 minutes in all
at 7B, 4 GB in every step but the build, which `--build` adds (1.1 × the weights), and on the disk 1.55 × the checkpoint, plans aside. The last lines
are each figure ÷ its limit. Exit code 1 where one is missed or a stage fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parity_memory import LIMIT_MB, watched

LIMIT_MINUTES = {"7b": 30.0}
LIMIT_BUILD, LIMIT_DISK = 1.1, 1.55
NUMBERS = ("noise_ratio", "strict_noise_ratio", "worst_local_ratio", "mean_kl")


def main() -> int:
    """Print one line a step, the stages, and each figure ÷ its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="7b")
    parser.add_argument("--precision", default="int8", choices=("int8", "int4", "none"))
    parser.add_argument("--stage", action="append", help="what to validate; default: all that was made")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave the artifact where it is")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    artifact = options.folder / f"full-size-{options.size}"
    start, peaks, reports = time.perf_counter(), dict[str, float](), dict[str, dict[str, Any]]()
    for name, command in _steps(options, artifact):
        begun = time.perf_counter()
        reports[name], peaks[name] = watched(*command)
        print(f"{name:9} {time.perf_counter() - begun:7.0f} s   anonymous {peaks[name]:6.0f} MB   load {os.getloadavg()[0]:.1f}", flush=True)
    minutes = (time.perf_counter() - start) / 60
    _say(reports["validate"])
    figures = _figures(options, artifact, minutes, peaks, reports)
    for what, figure, limit, unit in figures:
        print(f"{what:44} {figure:9.2f} {unit:4} ÷ {limit:g}: {figure / limit:.2f}")
    if not options.keep:
        shutil.rmtree(artifact)
    return 0 if reports["validate"]["passed"] is not False and all(figure <= limit for _, figure, limit, _ in figures) else 1


def _figures(
    options: argparse.Namespace, artifact: Path, minutes: float, peaks: dict[str, float], reports: dict[str, dict[str, Any]]
) -> list[tuple[str, float, float, str]]:
    """(what, figure, limit, unit): minutes where the size has a limit, memory, and the disk without plans."""
    checkpoint = reports["export"]["weights_bytes"]
    disk = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file() and path.suffix != ".plan")
    worst = max((name for name in peaks if name != "build"), key=peaks.__getitem__)
    figures = [
        (f"anonymous memory, the worst step: {worst}", peaks[worst], float(LIMIT_MB), "MB"),
        ("disk ÷ checkpoint", disk / checkpoint, LIMIT_DISK, ""),
    ]
    if options.size in LIMIT_MINUTES:
        figures.insert(0, ("all steps", minutes, LIMIT_MINUTES[options.size], "min"))
    if "build" in peaks:
        plans = sum(path.stat().st_size for path in artifact.rglob("*.plan"))
        figures.append(("anonymous memory of the build ÷ its weights", peaks["build"] * 1e6 / plans, LIMIT_BUILD, ""))
    return figures


def _steps(options: argparse.Namespace, artifact: Path) -> list[tuple[str, tuple[str, ...]]]:
    art, precision = str(artifact), options.precision
    steps = [("export", ("export", "--size", options.size, "--checkpoint", "random:0", "--out", art)), ("fuse", ("fuse", art))]
    if precision != "none":
        steps.append(("quantize", ("quantize", art, "--scheme", precision, "--calibration", "none")))
    if options.build:
        steps.append(("build", ("build", art, "--precision", "fp16" if precision == "none" else precision)))
    return [*steps, ("validate", ("validate", art, "--streamed", *(f"--stage={stage}" for stage in options.stage or ())))]


def _say(report: dict[str, Any]) -> None:
    print(report["headline"], "·", report["execution"]["reason"])
    for stage in report["stages"]:
        numbers = ", ".join(f"{key} {stage[key]:.3g}" for key in NUMBERS if stage[key] is not None)
        print(f"  {stage['stage']:12} {stage['seconds']:6.0f} s   passed: {stage['passed']}   {numbers}   {stage['seconds_by_part']}")
    print("  ", report["seconds_by_part"])


if __name__ == "__main__":
    sys.exit(main())
