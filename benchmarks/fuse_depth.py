"""What `fuse` costs of 7B-wide graphs of 8, 32 and 80 layers, in one run, as a share of its limits: `python benchmarks/fuse_depth.py [--repeats N]`.

The graphs come from `export --weights none`: there is no weight that could be read, and the folder is looked at before and after. Each measurement
is a process of its own; imports count in its memory and in `process s`, not in the seconds of `fuse`, which are CPU seconds beside others' work. The
depths take turns, the least seconds and the most memory count. The last column is the same graph for TensorRT 10.0, every fused operator written
out again. Exit code 1 where a limit is passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import ROOT, config_of

DEPTHS, MODEL = (8, 32, 80), 32
MAX_SECONDS, MAX_RSS_MB, MAX_GROWTH = 10.0, 1000.0, 1.3
"""Of the model's depth; growth is seconds a layer at 80 layers ÷ at 8, 1 where the cost is linear."""
Result = dict[str, float]


def export(folder: Path, layers: int) -> Path:
    """An artifact of this depth that holds the graph alone."""
    artifact, config = folder / f"{layers}", folder / f"{layers}.json"
    config.write_text(json.dumps(config_of("7b", layers)))
    run("export", "--checkpoint", "random", "--config", str(config), "--out", str(artifact), "--weights", "none", "--json")
    held = sorted(path.name for path in artifact.rglob("*.safetensors"))
    assert held == [], held
    return artifact


def run(*arguments: str) -> None:
    """One command, quietly."""
    subprocess.run([sys.executable, ROOT / "cli.py", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)


def measure(artifact: Path, release: str) -> None:
    """One measurement, in this process: prints a JSON object."""
    from commands.graphs import fuse
    from graphs import pipeline

    assert pipeline.PIPELINES  # imported before the clock starts
    start = time.process_time()
    report = fuse(artifact, min_tensorrt=release or None, force=True).report
    seconds = time.process_time() - start
    peak_kb = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    assert report["passed"] is True
    print(json.dumps({"fuse_s": seconds, "rss_mb": peak_kb / 1024, "nodes": report["nodes_before"], "nodes_after": report["nodes_after"]}))


def measured(artifact: Path, release: str) -> Result:
    """One measurement, in a process of its own, with the seconds of the whole process."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--measure", str(artifact), release]
    result: Result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result | {"process_s": time.perf_counter() - start}


def compare(repeats: int) -> bool:
    """Print seconds and memory by depth, and the shares of the limits; whether all hold."""
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = {layers: export(Path(scratch), layers) for layers in DEPTHS}
        runs = [{layers: (measured(path, ""), measured(path, "10.0")) for layers, path in artifacts.items()} for _ in range(repeats)]
        assert not any(Path(scratch).rglob("*.safetensors"))
    best = {layers: {name: min(one[layers][0][name] for one in runs) for name in runs[0][layers][0]} for layers in DEPTHS}
    lowered = {layers: min(one[layers][1]["fuse_s"] for one in runs) for layers in DEPTHS}
    peak = max(result["rss_mb"] for one in runs for result in one[MODEL])
    print(f"{'layers':>6} {'nodes':>12} {'CPU s':>7} {'ms/layer':>9} {'process s':>10} {'peak MB':>8} {'for 10.0':>9}")
    for layers, row in best.items():
        nodes = f"{row['nodes']:.0f} → {row['nodes_after']:.0f}"
        largest = max(one[layers][0]["rss_mb"] for one in runs)
        times = f"{row['fuse_s']:7.2f} {1000 * row['fuse_s'] / layers:9.1f} {row['process_s']:10.2f}"
        print(f"{layers:6} {nodes:>12} {times} {largest:8.0f} {lowered[layers]:9.2f}")
    growth = (best[80]["fuse_s"] / 80) / (best[8]["fuse_s"] / 8)
    rows = (
        (f"{MODEL} layers, process s", best[MODEL]["process_s"], MAX_SECONDS),
        (f"{MODEL} layers, for 10.0, CPU s", lowered[MODEL], MAX_SECONDS),
        (f"{MODEL} layers, peak MB", peak, MAX_RSS_MB),
        ("CPU s a layer, 80 ÷ 8 layers", growth, MAX_GROWTH),
    )
    for what, value, limit in rows:
        print(f"{what:32} {value:8.2f}  limit {limit:8.2f}  ratio {value / limit:6.3f}")
    return all(value <= limit for _, value, limit in rows)


def main() -> int:
    """Compare the depths, or be one of the processes that measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Path(arguments.measure[0]), arguments.measure[1])
        return 0
    return 0 if compare(arguments.repeats) else 1


if __name__ == "__main__":
    sys.exit(main())
