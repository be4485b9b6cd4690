"""What quantising weights costs, plain and driven by data: time against `cp` of the bytes that are read, and peak memory, at real widths.

    python benchmarks/quantize_weights.py [--layers 2] [--plain] [--folder DIR] [7b 70b]

Weights and activations are random. Each run is a process of its own; `cp` and plain rounding take turns. Exit code 1 where plain int8 is below the
limit of speed, or any plain run above that of memory; data-driven rounding is bound by arithmetic, and what it costs is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from export_memory import export
from safetensors.numpy import save_file
from shapes import SHAPES, config_of, write_checkpoint

LEAST_RATIO, LIMIT_MB = 0.5, 1500
SAMPLES = 2048
SITES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj")


def main() -> int:
    """Print one line a run, and how each compares with its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["7b", "70b"], help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--artifact", type=Path, help="Quantise this one in this process, and say what it took.")
    parser.add_argument("--scheme", choices=("int8", "int4"), default="int8")
    parser.add_argument("--driven", action="store_true")
    parser.add_argument("--plain", action="store_true", help="Leave out data-driven rounding, which takes minutes a layer.")
    options = parser.parse_args()
    if options.artifact is not None:
        print(json.dumps(_quantize(options.artifact, options.scheme, driven=options.driven)))
        return 0
    return max(_measure(options, size) for size in options.sizes)


def _measure(options: argparse.Namespace, size: str) -> int:
    config = config_of(size, options.layers)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        artifact = Path(scratch) / "artifact"
        write_checkpoint(Path(scratch) / "checkpoint", config)
        export(Path(scratch) / "checkpoint", artifact)
        subprocess.run([sys.executable, Path(__file__).resolve().parents[1] / "cli.py", "fuse", artifact], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(Path(scratch) / "checkpoint")
        files = sorted((artifact / "weights").glob("layer-*.safetensors"))
        read = sum(file.stat().st_size for file in files)
        runs: dict[str, list[dict[str, float]]] = {"int8": [], "int4": []}
        ratios = []
        for _ in range(options.repeats):
            copied = _cp(files, Path(scratch) / "copy")
            for scheme, found in runs.items():
                found.append(_alone(artifact, scheme))
            ratios.append(copied / runs["int8"][-1]["seconds"])
        for scheme, found in runs.items():
            _say(size, f"{scheme} plain", found, read)
        if not options.plain:
            _write_statistics(artifact / "calibration.safetensors", config["hidden_size"], config["intermediate_size"], options.layers)
            _say(size, "int8 driven", [_alone(artifact, "int8", "--driven")], read)
    ratio, peak = statistics.median(ratios), max(run["peak_rss_mb"] for found in runs.values() for run in found)
    load = f"load {os.getloadavg()[0]:.1f}"
    print(f"{size:4} plain int8 ÷ cp, speed: {ratio:.2f} (limit {LEAST_RATIO}); peak ÷ {LIMIT_MB} MB: {peak / LIMIT_MB:.2f}; {load}")
    return 0 if ratio >= LEAST_RATIO and peak <= LIMIT_MB else 1


def _say(size: str, what: str, runs: list[dict[str, float]], read: int) -> None:
    middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    speed = read / middle["seconds"] / 1e9
    print(
        f"{size:4} {what:12} {middle['seconds']:6.1f} s ({middle['cpu_s']:6.1f} CPU s)  {speed:5.2f} GB/s  peak {middle['peak_rss_mb']:5.0f} MB",
        flush=True,
    )


def _cp(files: list[Path], out: Path) -> float:
    """Seconds to copy some files, the final sync included."""
    os.sync()
    out.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", *files, out], check=True)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def _alone(artifact: Path, scheme: str, *flags: str) -> dict[str, float]:
    """One quantisation in a process of its own."""
    os.sync()
    command = [sys.executable, __file__, "--artifact", artifact, "--scheme", scheme, *flags]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def _quantize(artifact: Path, scheme: str, *, driven: bool) -> dict[str, float]:
    from artifact.steps import StepContext
    from graphs.quantize.int4 import quantize_int4
    from graphs.quantize.int8 import quantize_int8
    from graphs.quantize.statistics import Statistics

    seen = Statistics(artifact / "calibration.safetensors") if driven else None
    start = time.perf_counter()
    {"int8": quantize_int8, "int4": quantize_int4}[scheme](StepContext(artifact), seen)
    seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_rss_mb": usage.ru_maxrss * 1024 / 1e6}


def _write_statistics(path: Path, hidden: int, ffn: int, layers: int) -> None:
    """Random activations of the size that calibration keeps."""
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for site in (*SITES, "mlp.down_proj"):
            samples = rng.standard_normal((SAMPLES, ffn if site == "mlp.down_proj" else hidden), np.float32).astype(np.float16)
            exact = samples[:1].astype(np.float32)
            fields = {"absmax": np.abs(exact[0]), "mean_square": np.ones_like(exact[0]), "samples": samples, "first": samples[:1]}
            tensors |= {f"model.layers.{layer}.{site}.{name}": value for name, value in fields.items()}
    save_file(tensors, path)


if __name__ == "__main__":
    sys.exit(main())
