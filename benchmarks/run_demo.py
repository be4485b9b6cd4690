"""What the demo costs, measured in one run and printed as a share of its limits.

    python benchmarks/run_demo.py [FOLDER]

Runs `cli.py run --checkpoint demo` with FP16 and INT8 into an empty folder, then once more to see what an up-to-date run costs.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "run --checkpoint demo --precision fp16 --precision int8 --json --out".split()


def run(folder: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of one whole process, and its report."""
    start = time.perf_counter()
    result = subprocess.run([sys.executable, ROOT / "cli.py", *COMMAND, folder], stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - start, json.loads(result.stdout)


def main() -> None:
    """Print measured, limit and their ratio."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="demo-")) / "artifact"
    seconds, report = run(folder)
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    again, _ = run(folder)
    engines = {precision: report[f"build-{precision}"]["engines"][0] for precision in ("fp16", "int8")}
    audit = engines["fp16"]["audit"]["checks"]
    checks, limits = ({check["check"]: check[key] for check in audit} for key in ("value", "limit"))
    rows = [
        ("whole run, s", seconds, 360),
        ("peak memory of a process, MB", peak_mb, 6000),
        ("second run, s", again, 10),
        *((f"{precision} plan built in, s", engine["build_s"], 20) for precision, engine in engines.items()),
        ("fp16 plan's constants ÷ the graph's", checks["constant_bytes_per_weight_byte"], 1.06),
        ("fp16 plan ÷ the graph's constants", checks["plan_bytes_per_weight_byte"], limits["plan_bytes_per_weight_byte"]),
        ("int8 plan, bytes per quantised weight", engines["int8"]["bytes_per_weight"], 1.05),
    ]
    for what, value, limit in rows:
        sys.stdout.write(f"{what:40} {value:10.3f}  limit {limit:8.2f}  ratio {value / limit:6.3f}\n")
    shutil.rmtree(folder.parent if len(sys.argv) == 1 else folder)


if __name__ == "__main__":
    main()
