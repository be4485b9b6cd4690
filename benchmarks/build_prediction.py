"""Predicted against measured, memory of a build and size of its plan: `python benchmarks/build_prediction.py [--folder DIR] [7b:8:fp16 …]`.

Each case is SIZE:LAYERS:PRECISION: random weights of real widths (unique bytes in every layer, for TensorRT stores equal constants once), exported,
fused, quantised and built by the toolkit's own commands, one after the other; files go as soon as they are not needed. Exit code 1 where a ratio is
outside the limit. ``--70b`` builds one part of 70B widths, of as many layers as ``--layers``, and predicts the rest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from shapes import BASE, ROOT, config_of

sys.path.insert(0, str(ROOT))

from artifact.config import LlamaConfig
from artifact.progress import silent
from engines.backends.protocol import BuildRequest
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.build import STAGES
from engines.build_cost import BuildCost, build_cost
from engines.engine_graph import write_engine_graph
from engines.graph_weights import weights_bytes
from engines.part_plan import part_graph
from engines.profiles import make_profiles
from engines.targets import find_target
from engines.weight_sizes import weight_sizes

CASES = ("demo:30:fp16", "demo:30:int8", "1.1b:22:fp16", "1.1b:22:int8", "7b:8:fp16", "7b:8:int8", "13b:2:int8")
FULL = ("7b:32:fp16", "13b:40:int8")
"""13.4 GB of memory each, and 27 and 53 GB of disk."""
DEMO = BASE | {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
LIMIT_PCT = {"memory": 10.0, "plan": 2.0, "weights": 2.0}


@dataclass(frozen=True)
class Case:
    """One build."""

    size: str
    layers: int
    precision: str

    @classmethod
    def of(cls, text: str) -> Case:
        """``7b:8:fp16``."""
        size, layers, precision = text.split(":")
        return cls(size, int(layers), precision)

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return DEMO | {"num_hidden_layers": self.layers} if self.size == "demo" else dict(config_of(self.size, self.layers))


def main() -> int:
    """Print a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--full", action="store_true", help="the whole 7B FP16 and 13B INT8 too, one at a time")
    parser.add_argument("--70b", dest="seventy", action="store_true", help="one part of 70B widths")
    parser.add_argument("--layers", type=int, default=2, help="of that part")
    options = parser.parse_args()
    texts = options.cases or [*CASES, *(FULL if options.full else ())]
    cases = [Case("70b", options.layers, "int8")] if options.seventy else [Case.of(text) for text in texts]
    worst = 0.0
    print(f"{'case':16} {'':8} {'predicted':>12} {'measured':>12} {'ratio':>7}")
    for case in cases:
        worst = max(worst, *_compare(case, _measure(options.folder, case)))
    if options.seventy:
        _estimate_rest(options.layers)
    return 0 if worst <= 1 else 1


def predict(case: Case) -> tuple[int, BuildCost]:
    """Bytes of the weights, and the build's cost, from the shape alone."""
    config = LlamaConfig.from_hf(case.config)
    sizes = weight_sizes(config, case.precision)
    whole = (0, config.num_hidden_layers - 1)
    graph = part_graph(sizes, whole, case.precision, packed=True, static=False, tied=config.tie_word_embeddings)
    return graph.weights_bytes, build_cost(graph)


def _measure(folder: Path, case: Case) -> dict[str, float]:
    """Build it; sizes in bytes, memory in MB."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        artifact, config = Path(scratch) / "artifact", Path(scratch) / "config.json"
        config.write_text(json.dumps(case.config))
        _cli("export", "--checkpoint", "random:0", "--config", config, "--out", artifact)
        _cli("fuse", artifact)
        if case.precision != "fp16":
            _cli("quantize", artifact, "--scheme", case.precision, "--calibration", "none")
            _drop_linears(artifact)
        return _build(artifact, case)


def _build(artifact: Path, case: Case) -> dict[str, float]:
    """The engine graph, and its plan, as `build` makes them; past its checks, which would miss the linears that are gone."""
    config = LlamaConfig.from_hf(case.config)
    graph, plan = artifact / "engine.onnx", artifact / "engine.plan"
    write_engine_graph(artifact / f"{STAGES[case.precision]}.onnx", graph)
    profiles = make_profiles(config, "fp16", max_batch=4, max_length=min(4096, config.max_position_embeddings))
    result = TensorRTRTX().build(BuildRequest(graph, plan, find_target("a100"), tuple(profiles)), silent)
    weights = weights_bytes(ir.load(graph).graph)
    return {"weights": weights, "plan": plan.stat().st_size, "memory": result.peak_anonymous_mb * 1e6, "seconds": result.seconds}


def _drop_linears(artifact: Path) -> None:
    """Give back the disk of float16 linears, which a quantised engine reads no more: 24 GB of a 13B. Their places stay, as holes."""
    graph = ir.load(artifact / "fused.onnx").graph
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and ".layers." in str(value.name) and len(tensor.shape) > 1:
            where = ["--offset", str(tensor.offset), "--length", str(tensor.length)]
            subprocess.run(["fallocate", "--punch-hole", *where, str(artifact / str(tensor.location))], check=True)


def _cli(*arguments: object) -> dict[str, Any]:
    """One command; its report."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-800:]}")
    return dict(json.loads(done.stdout))


def _compare(case: Case, measured: dict[str, float]) -> list[float]:
    """Print three lines; how far each is off, in limits."""
    weights, cost = predict(case)
    predicted = {"weights": weights, "plan": cost.plan_bytes, "memory": cost.compiler_bytes}
    name = f"{case.size}:{case.layers}:{case.precision}"
    for what, value in predicted.items():
        ratio = value / measured[what]
        print(f"{name:16} {what:8} {value / 1e6:9,.0f} MB {measured[what] / 1e6:9,.0f} MB {ratio:7.3f}", flush=True)
    print(f"{name:16} {'seconds':8} {cost.seconds:9,.0f} s  {measured['seconds']:9,.0f} s", flush=True)
    return [abs(value / measured[what] - 1) * 100 / LIMIT_PCT[what] for what, value in predicted.items()]


def _estimate_rest(layers: int) -> None:
    """The whole 70B, from the rules that the part was held to."""
    for precision in ("int8", "fp16"):
        weights, cost = predict(Case("70b", 80, precision))
        whole = f"weights {weights / 1e9:.1f} GB, plans {cost.plan_bytes / 1e9:.1f} GB in all, {80 // layers} parts of {layers} layers"
        print(f"70b {precision}: {whole}; one plan would take {cost.memory_bytes / 1e9:.1f} GB to build (predicted, not built)")


if __name__ == "__main__":
    sys.exit(main())
