"""Peak memory of a whole `export`, by size and format: `python benchmarks/export_memory.py [--folder DIR] [7b 13b 70b]`.

The widths are the real ones, the depth is cut to --layers: one block of one tensor is held at a time, so memory does not depend on depth (a deeper
run only adds nodes to the graph: 12 MB from 1 to 80 layers of 70B). Exit code 1 where a process needs more than the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from shapes import ROOT, SHAPES, config_of, write_checkpoint

LIMIT_MB = 1000
FORMATS = ("F16", "BF16")


def main() -> int:
    """Print one line a size and format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["7b", "13b", "70b"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    worst = 0.0
    for size in options.sizes:
        for dtype in FORMATS:
            with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                stored = write_checkpoint(Path(scratch) / "checkpoint", config_of(size, options.layers), dtype)
                report, peak_mb = export(Path(scratch) / "checkpoint", Path(scratch) / "artifact")
            worst = max(worst, peak_mb)
            print(
                f"{size:5} safetensors {dtype:4}  {options.layers} layers, {stored / 1e9:5.2f} GB  trace {report['trace_s']:5.1f} s  "
                f"weights {report['weights_s']:5.1f} s  peak {peak_mb:4.0f} MB  limit {LIMIT_MB}  ratio {peak_mb / LIMIT_MB:.3f}",
                flush=True,
            )
    return 0 if worst <= LIMIT_MB else 1


def export(source: Path, out: Path) -> tuple[dict[str, float], float]:
    """The report of one export in a process of its own, and the largest resident memory that the system saw, in MB."""
    command = [sys.executable, str(ROOT / "cli.py"), "export", "--checkpoint", str(source), "--out", str(out), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: exit code {process.returncode}")
    report: dict[str, float] = json.loads(text)
    return report, usage.ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
