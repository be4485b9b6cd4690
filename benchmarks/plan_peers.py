"""SM80 plans of one model from the graphs of several exporters, built and read in one run: SmolLM2-135M in float16, prefill and decode profiles.

    python -m benchmarks.plan_peers [--python PYTHON_WITH_OPTIMUM] [--folder DIR] [--exports DIR]

optimum-onnx comes from the Python that is named and is skipped where that lacks it. ``--exports`` keeps the peers' graphs and uses what is there.
Limits of ours: 15 s, 900 MB of anonymous memory, every weight stored once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from safetensors.numpy import load_file, save_file

from artifact.config import LlamaConfig
from artifact.engine_names import engine_graph, has_gemv
from artifact.errors import EngineError
from artifact.layout import tensor_shapes, weight_files
from artifact.manifest import read_manifest
from artifact.progress import silent
from benchmarks.plan_kernels import children_cpu_s
from benchmarks.shapes import ROOT
from engines.backends.protocol import BuildRequest, BuildResult
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.decode_form import suits
from engines.device_fit import load_of
from engines.engine_graph import write_engine_graph
from engines.graph_weights import weights_bytes
from engines.plan_program import Program, read_programs
from engines.profiles import make_profiles
from engines.targets import find_target

CLI = [sys.executable, str(ROOT / "cli.py")]
OPTIMUM = "-m optimum.commands.optimum_cli export onnx --task text-generation-with-past --dtype fp16 -m".split()
MAX_BATCH, MAX_LENGTH, MEGABYTE = 4, 2048, 10**6
LIMITS = {"built in s": 15.0, "anonymous MB": 900.0, "constants ÷ weights": 1.0}


@dataclass(frozen=True)
class Row:
    """One plan."""

    build: BuildResult
    cpu_s: float
    plan_bytes: int
    weights_bytes: int
    programs: list[Program]

    def cells(self) -> dict[str, float | str]:
        """What the table shows."""
        constants = {constant for program in self.programs for constant in program.constants}
        fused = [sum("mha" in kernel.name for kernel in program.kernels) for program in self.programs]
        return {
            "network layers": self.build.network_layers,
            "launches": " / ".join(str(len(program.kernels)) for program in self.programs),
            "fused attention": " / ".join(map(str, fused)),
            "built in s": self.build.seconds,
            "CPU s": round(self.cpu_s, 1),
            "anonymous MB": self.build.peak_anonymous_mb,
            "plan MB": round(self.plan_bytes / MEGABYTE),
            "plan ÷ weights": round(self.plan_bytes / self.weights_bytes, 3),
            "constants ÷ weights": round(sum(constant.size_bytes for constant in constants) / self.weights_bytes, 3),
        }


def main() -> None:
    """Print one table and the ratios to ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the Python whose packages hold optimum-onnx")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--exports", type=Path, help="folder that keeps the peers' graphs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        artifact = Path(scratch) / "artifact"
        for command in (["export", "--checkpoint", "demo", "--out", str(artifact)], ["fuse", str(artifact)]):
            run([*CLI, *command])
        config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
        load = load_of(config, "fp16", "dynamic", max_batch=MAX_BATCH, max_length=MAX_LENGTH)
        gemv = suits(config, load, find_target("a100"), packed=True)
        ours = artifact / engine_graph("fused", gemv=gemv)
        write_engine_graph(artifact / "fused.onnx", ours, decode_gemv=gemv)
        weights = weights_bytes(ir.load(ours).graph)
        graphs = peer_graphs(artifact, config, options.exports or Path(scratch) / "exports", options.python)
        rows = {"this toolkit": measure(ours, config, weights, Path(scratch))}
        rows |= {name: measure(graph, config, weights, Path(scratch)) for name, graph in graphs}
    print_table(rows)


def run(command: list[str]) -> bool:
    """Whether a command succeeded; what it says is shown where it did not."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"skipped: {' '.join(command)}\n{done.stderr[-600:]}", file=sys.stderr)
    return not done.returncode


def peer_graphs(artifact: Path, config: LlamaConfig, exports: Path, python: str) -> Iterator[tuple[str, Path]]:
    """Exports by others of the same weights, and what `fuse --graph` makes of them."""
    checkpoint = exports / "checkpoint"
    write_checkpoint(artifact, config, checkpoint)
    commands = {
        "optimum": [python, *OPTIMUM, str(checkpoint), str(exports / "optimum")],
        "dynamo": [sys.executable, str(ROOT / "benchmarks" / "export_dynamo.py"), str(checkpoint), str(exports / "dynamo" / "model.onnx")],
    }
    for name, command in commands.items():
        graph, fused = exports / name / "model.onnx", exports / f"{name}-fused" / "model.onnx"
        for file in (graph, fused):
            file.parent.mkdir(parents=True, exist_ok=True)
        if graph.exists() or run(command):
            yield name, graph
            if run([*CLI, "fuse", "--graph", str(graph), "--out", str(fused)]):
                yield f"{name}, then fuse --graph", fused


def write_checkpoint(artifact: Path, config: LlamaConfig, folder: Path) -> None:
    """The artifact's weights as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor for file in weight_files(config) for name, tensor in load_file(artifact / file).items()}
    save_file({name: stored[name] for name in tensor_shapes(config)}, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((artifact / name).read_bytes())


def measure(graph: Path, config: LlamaConfig, weights: int, scratch: Path) -> Row | str:
    """Build and read one plan; why it can't be built."""
    plan = scratch / "peer.plan"
    profiles = make_profiles(config, "fp16", max_batch=MAX_BATCH, max_length=MAX_LENGTH, gemv=has_gemv(graph.stem))
    before = children_cpu_s()
    try:
        built = TensorRTRTX().build(BuildRequest(graph, plan, find_target("a100"), tuple(profiles)), silent)
    except EngineError as error:
        return str(error)
    return Row(built, children_cpu_s() - before, plan.stat().st_size, weights, read_programs(plan))


def print_table(rows: dict[str, Row | str]) -> None:
    """One line a plan, then ours against its limits and the best peer."""
    cells = {name: row.cells() for name, row in rows.items() if isinstance(row, Row)}
    columns = list(cells["this toolkit"])
    print("| exporter |", " | ".join(columns), "|\n|", " | ".join(["---"] * (len(columns) + 1)), "|")
    for name, row in rows.items():
        print(f"| {name} |", row if isinstance(row, str) else " | ".join(str(value) for value in cells[name].values()), "|")
    for what, limit in LIMITS.items():
        ours, others = float(cells["this toolkit"][what]), [float(cell[what]) for name, cell in cells.items() if name != "this toolkit"]
        against = f", {ours / min(others):.2f} × the best peer's" if others else ""
        print(f"{what}: {ours} (limit {limit}: {'kept' if ours <= limit else 'BROKEN'}){against}")


if __name__ == "__main__":
    main()
