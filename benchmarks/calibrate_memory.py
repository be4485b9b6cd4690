"""Peak memory of a calibration, by size and depth: `python benchmarks/calibrate_memory.py [--folder DIR] [--layers 1 3] [7b 13b]`.

The widths are the real ones, weights and token ids are random, and the depth is cut twice: what two depths have in common is what any depth takes,
because a layer's weights and what was gathered in it are gone when its statistics are written. Exit code 1 where a process needs more than the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from export_memory import export
from shapes import SHAPES, config_of, write_checkpoint

from artifact.calibration import CALIBRATION, STATIC_TOKENS

LIMIT_MB = 4000
LENGTH = 256
SEQUENCES = STATIC_TOKENS // LENGTH
"""The most that a scheme asks for by itself."""


def main() -> int:
    """Print one line a size and depth, with the ratio to the limit, and one a size with the growth by layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["7b", "13b"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--artifact", type=Path, help="Calibrate this one in this process, and say what it took.")
    options = parser.parse_args()
    if options.artifact is not None:
        print(json.dumps(calibrate(options.artifact)))
        return 0
    worst = 0.0
    for size in options.sizes:
        peaks = {layers: _measure(options.folder, size, layers) for layers in options.layers}
        worst = max(worst, *peaks.values())
        fewest, most = min(peaks), max(peaks)
        if most > fewest:
            print(f"{size:5} a layer more takes {(peaks[most] - peaks[fewest]) / (most - fewest):+.0f} MB more", flush=True)
    return 0 if worst <= LIMIT_MB else 1


def _measure(folder: Path, size: str, layers: int) -> float:
    """Peak memory of one calibration in a process of its own, MB."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        artifact = Path(scratch) / "artifact"
        write_checkpoint(Path(scratch) / "checkpoint", config_of(size, layers))
        export(Path(scratch) / "checkpoint", artifact)
        command = [sys.executable, __file__, "--artifact", str(artifact)]
        found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    print(
        f"{size:5} {layers} layers, {SEQUENCES} × {LENGTH} tokens  {found['seconds'] / layers:5.1f} s a layer  statistics "
        f"{found['bytes'] / layers / 1e6:4.0f} MB a layer  peak {found['peak_rss_mb']:5.0f} MB  limit {LIMIT_MB}  "
        f"ratio {found['peak_rss_mb'] / LIMIT_MB:.3f}",
        flush=True,
    )
    return found["peak_rss_mb"]


def calibrate(artifact: Path) -> dict[str, float]:
    """Calibrate on random ids: random weights have no tokenizer, and memory does not depend on the words."""
    from artifact.config import LlamaConfig
    from artifact.manifest import read_manifest
    from artifact.memory import peak_rss_mb
    from artifact.steps import StepContext
    from validation.artifact_weights import artifact_reader
    from validation.calibration import write_statistics
    from validation.calibration_text import CalibrationText
    from validation.reference import Reference

    config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (SEQUENCES, LENGTH))
    ids[:, 0] = config.bos_token_id or 0
    text = CalibrationText(tuple(ids), config.bos_token_id, "random ids", "", 0)
    start = time.perf_counter()
    report = write_statistics(StepContext(artifact), Reference(config, artifact_reader(artifact)), text, "", CALIBRATION)
    return {"seconds": time.perf_counter() - start, "bytes": report["bytes"], "peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    sys.exit(main())
