"""Peak memory of a whole `export`, by size and format: `python benchmarks/export_memory.py [--folder DIR] [7b 13b 70b]`.

The widths are the real ones, the depth is cut to --layers: one block of one tensor is held at a time, so memory does not depend on depth (a deeper
run only adds nodes to the graph: 12 MB from 1 to 80 layers of 70B). Exit code 1 where a process needs more than the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from formats import FORMATS
from shapes import ROOT, SHAPES, config_of, write_checkpoint

LIMIT_MB = 1000


def main() -> int:
    """Print one line a size and format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["7b", "13b", "70b"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    worst = 0.0
    for size in options.sizes:
        for name, dtype in [("safetensors", "BF16"), *((name, "F16") for name in FORMATS)]:
            with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
                stored = write_checkpoint(Path(scratch) / "checkpoint", config_of(size, options.layers), dtype)
                source = FORMATS[name](Path(scratch) / "checkpoint", Path(scratch) / "other")
                report = export(source, Path(scratch) / "artifact")
            peak_mb = report["peak_rss_mb"]
            worst = max(worst, peak_mb)
            print(
                f"{size:5} {name:13} {dtype:4}  {options.layers} layers, {stored / 1e9:5.2f} GB  trace {report['trace_s']:5.1f} s  "
                f"weights {report['weights_s']:5.1f} s  peak {peak_mb:4.0f} MB  limit {LIMIT_MB}  ratio {peak_mb / LIMIT_MB:.3f}",
                flush=True,
            )
    return 0 if worst <= LIMIT_MB else 1


def export(source: Path, out: Path) -> dict[str, float]:
    """The report of one export in a process of its own; its peak is from there, because what wait4 says includes this process's, its parent."""
    command = [sys.executable, str(ROOT / "cli.py"), "export", "--checkpoint", str(source), "--out", str(out), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: exit code {done.returncode}")
    report: dict[str, float] = json.loads(done.stdout)
    return report


if __name__ == "__main__":
    sys.exit(main())
