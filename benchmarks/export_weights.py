"""How fast are weights written, against `cp` of the same bytes on the same disk, both with the final sync, in turns.

    python benchmarks/export_weights.py [--gigabytes 3] [--dtype BF16] [--folder DIR]

Needs three times --gigabytes of free disk under --folder; everything is removed afterwards. Exit code 1 below the limit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import config_of, write_checkpoint

from artifact.steps import StepContext
from exporter.checkpoints import open_checkpoint
from exporter.weights import write_weights

LIMIT = 0.7
LAYER_BYTES, SHARED_BYTES = 404_766_720, 524_296_192  # of 7B in float16


def main() -> int:
    """Print GB/s of both and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("F16", "BF16"), default="F16", help="of the checkpoint; BF16 is converted")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source = Path(scratch) / "checkpoint"
        layers = max(1, round((options.gigabytes * 1e9 - SHARED_BYTES) / LAYER_BYTES))
        size = write_checkpoint(source, config_of("7b", layers), options.dtype)
        print(f"{size / 1e9:.2f} GB of {options.dtype}, 7B widths, {layers} layers; load {os.getloadavg()[0]:.1f}")
        ratios = []
        for turn in range(options.repeats):
            copy, ours = (_timed(work, source, Path(scratch) / "out") for work in (_cp, _export))
            ratios.append(copy[0] / ours[0])
            speeds = " · ".join(f"{name} {size / wall / 1e9:.2f} GB/s ({cpu:.1f} CPU s)" for name, (wall, cpu) in (("cp", copy), ("ours", ours)))
            print(f"turn {turn + 1}: {speeds} · ratio {ratios[-1]:.2f}")
    median = statistics.median(ratios)
    print(f"ratio to cp: {median:.2f} (limit {LIMIT})")
    return 0 if median >= LIMIT else 1


def _timed(work: object, source: Path, out: Path) -> tuple[float, float]:
    """Seconds on the clock and of the processor, the final sync included."""
    os.sync()
    before, start = os.times(), time.perf_counter()
    work(source, out)  # type: ignore[operator]
    seconds, after = time.perf_counter() - start, os.times()
    shutil.rmtree(out)
    return seconds, sum(after[:4]) - sum(before[:4])


def _cp(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", source, out], check=True)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _export(source: Path, out: Path) -> None:
    write_weights(StepContext(out), open_checkpoint(str(source)), "fp16")


if __name__ == "__main__":
    sys.exit(main())
