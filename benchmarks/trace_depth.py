"""What a trace costs at 32 and at 80 layers, measured in one run and printed as a share of its limits.

    python benchmarks/trace_depth.py [--repeats N]

Traces, stamps and saves 7B and 70B shapes in both cache forms; no weights are read or written. Each measurement is a process of its own, and
the sizes take turns. Seconds are the least of the repeats, imports left out; memory is the largest, imports included. `kept` is the same once
more, with the trace that was kept the first time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = {
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
}
MAX_RATIO, MAX_SECONDS, MAX_RSS_MB = 1.3, 20, 1000


def measure(size: str, kv_cache: str, cache: str) -> None:
    """One measurement, in this process: prints a JSON object."""
    import onnx_ir as ir

    from artifact.config import LlamaConfig
    from artifact.memory import peak_rss_mb
    from exporter.stamp import stamp_layers
    from exporter.trace_cache import traced_layer

    config = LlamaConfig(**SHAPES[size], **SHARED)
    start, cpu = time.perf_counter(), time.process_time()
    layer, kept = traced_layer(config, "fp16", kv_cache, folder=Path(cache))
    traced = time.process_time()
    model = stamp_layers(layer, config)
    for value in model.graph.initializers.values():
        if value.const_value is None:  # as in an export: every weight is external data
            value.const_value = ir.ExternalTensor("none", offset=0, length=0, dtype=value.dtype, shape=value.shape, name=value.name)
    ir.save(model, Path(cache).with_suffix(".onnx"))
    end = time.process_time()
    result = {"seconds": time.perf_counter() - start, "cpu_s": end - cpu, "stamp_s": end - traced, "rss_mb": peak_rss_mb(), "kept": kept}
    sys.stdout.write(json.dumps(result))


def compare(repeats: int) -> None:
    """Print seconds and memory by size and cache form, and the ratio of the sizes."""
    found: dict[tuple[str, str, bool], list[dict[str, float]]] = defaultdict(list)
    for _ in range(repeats):
        for kv_cache, size in itertools.product(("dynamic", "static"), SHAPES):
            with tempfile.TemporaryDirectory() as folder:
                for _ in range(2):
                    command = [sys.executable, "-m", "benchmarks.trace_depth", "--measure", size, kv_cache, f"{folder}/traces"]
                    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout)
                    found[size, kv_cache, result["kept"]].append(result)
    best = {key: {name: min(run[name] for run in runs) for name in runs[0]} for key, runs in found.items()}
    print(f"{'':22}{'wall s':>9}{'CPU s':>9}{'of it stamp':>13}{'peak MB':>9}")
    for (size, kv_cache, kept), row in sorted(best.items()):
        peak = max(run["rss_mb"] for run in found[size, kv_cache, kept])
        name = f"{size} {kv_cache}{' kept' if kept else ''}"
        print(f"{name:22}{row['seconds']:9.2f}{row['cpu_s']:9.2f}{row['stamp_s']:13.2f}{peak:9.0f}")
    for kv_cache in ("dynamic", "static"):
        deep, shallow = best["70b", kv_cache, False], best["7b", kv_cache, False]
        peak = max(run["rss_mb"] for run in found["70b", kv_cache, False])
        rows = (
            ("CPU seconds, 70b ÷ 7b", deep["cpu_s"] / shallow["cpu_s"], MAX_RATIO),
            ("70b, wall s", deep["seconds"], MAX_SECONDS),
            ("70b, peak MB", peak, MAX_RSS_MB),
        )
        for what, value, limit in rows:
            print(f"{kv_cache:9}{what:30} {value:8.2f}  limit {limit:8.2f}  ratio {value / limit:6.3f}")


def main() -> None:
    """Compare the sizes, or be one of the processes that measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
    else:
        compare(arguments.repeats)


if __name__ == "__main__":
    main()
