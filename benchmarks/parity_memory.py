"""Memory of a streamed parity check at real widths, by depth: `python benchmarks/parity_memory.py [--folder DIR] [7b 13b] [--layers 2 4]`.

Random weights; export, fuse and int8, then `validate --streamed` in a process of its own, whose anonymous memory is sampled ten times a second:
weights that are mapped from files count as files and may be dropped. Every layer costs alike, so two depths show what grows: the difference is
printed for each layer. Exit code 1 where a run needs more than the limit, or the whole depth would.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from shapes import ROOT, SHAPES, config_of, write_checkpoint

LIMIT_MB = 4000
SAMPLE_S = 0.1


def main() -> int:
    """Print one line a run, and what the whole depth would take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["7b", "13b"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stages", nargs="+", default=["traced", "fused", "int8"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    worst = 0.0
    for size in options.sizes:
        peaks = {layers: _measure(options, size, layers) for layers in options.layers}
        (shallow, low), (deep, high) = min(peaks.items()), max(peaks.items())
        each = (high - low) / (deep - shallow) if deep > shallow else 0.0
        whole = high + each * (SHAPES[size][2] - deep)
        print(
            f"{size:4} a layer more: {each:+.0f} MB; all {SHAPES[size][2]} layers: {whole:.0f} MB, ÷ {LIMIT_MB} MB: {whole / LIMIT_MB:.2f}",
            flush=True,
        )
        worst = max(worst, high, whole)
    return 0 if worst <= LIMIT_MB else 1


def _measure(options: argparse.Namespace, size: str, layers: int) -> float:
    """Peak of anonymous memory in MB."""
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        artifact = make_artifact(Path(scratch), size, layers, options.stages)
        report, peak = watched("validate", str(artifact), "--streamed", *(f"--stage={stage}" for stage in options.stages))
    seconds = " ".join(f"{stage} {report['seconds_by_part'][stage]:.0f}" for stage in options.stages)
    print(
        f"{size:4} {layers} layers: anonymous {peak:5.0f} MB, ÷ {LIMIT_MB} MB: {peak / LIMIT_MB:.2f}; {report['seconds']:.0f} s ({seconds}); "
        f"passed: {report['passed']}; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return peak


def make_artifact(scratch: Path, size: str, layers: int | None, stages: list[str]) -> Path:
    """An artifact of random weights with some stages; the checkpoint stays beside it."""
    write_checkpoint(scratch / "checkpoint", config_of(size, layers))
    artifact = scratch / "artifact"
    watched("export", "--checkpoint", str(scratch / "checkpoint"), "--out", str(artifact))
    watched("fuse", str(artifact))
    for scheme in (stage for stage in stages if stage not in ("traced", "fused")):
        watched("quantize", str(artifact), "--scheme", scheme, "--calibration", "none")
    return artifact


def watched(*command: str) -> tuple[dict[str, Any], float]:
    """One command of the toolkit in a process of its own: its report, and the peak of the anonymous memory of it and its children in MB."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *command, "--json"], stdout=out, stderr=said)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_kb(process.pid) + sum(anonymous_kb(child) for child in _children(process.pid)))
            time.sleep(SAMPLE_S)
        out.seek(0)
        said.seek(0)
        if process.returncode not in (0, 3):
            raise SystemExit(f"{' '.join(command)} failed: exit code {process.returncode}\n{said.read().decode()[-2000:]}")
        report: dict[str, Any] = json.loads(out.read())
    return report, peak * 1024 / 1e6


def anonymous_kb(process: int) -> int:
    """Anonymous memory of a process now, in KiB; 0 of one that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def _children(process: int) -> list[int]:
    """A compiler runs in a process of its own."""
    try:
        return [child.pid for child in psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    if not Path("/proc/self/status").exists():
        sys.exit("needs Linux: /proc says what memory is anonymous")
    sys.exit(main())
