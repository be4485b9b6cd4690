"""SmolLM2-135M quantised by other tools, for benchmarks/quantization_quality.py: ONNX Runtime's quantiser, and ModelOpt in its own environment."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime_peers import write_checkpoint
from quality_rows import Yardstick
from shapes import ROOT

from artifact.config import LlamaConfig
from validation.calls import Turn, left_padded
from validation.graph_runner import call_feeds
from validation.perplexity import TokenScores

Ids = NDArray[np.int64]
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
MODELOPT = "nvidia-modelopt==0.47.0"
VERSIONS = {"ONNX Runtime": onnxruntime.__version__, "PyTorch": version("torch"), "transformers": version("transformers")}


class Sequences(CalibrationDataReader):  # type: ignore[misc]
    """Calibration sequences, each in one call."""

    def __init__(self, config: LlamaConfig, sequences: Sequence[Ids]) -> None:
        self._feeds: Iterator[dict[str, Any]] = (call_feeds(config, "fp32", next(iter(left_padded([Turn((ids,), (0,))])))) for ids in sequences)

    def get_next(self) -> dict[str, Any] | None:
        """The inputs of the next call, or None."""
        return next(self._feeds, None)


def fold_constants(graph: Path, out: Path) -> Path:
    """The graph with its weights transposed for good: ONNX Runtime's quantiser sees no other."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return out


def by_onnxruntime(folded: Path, folder: Path, config: LlamaConfig, sequences: Sequence[Ids]) -> dict[str, Callable[[], Path]]:
    """Name → what makes its graph: dynamic and static quantisation of every MatMul by a weight but lm_head, by output channel."""
    lm_head = [node for node in _products(folded) if "lm_head" in node or "logits" in node]
    kind: dict[str, Any] = {"op_types_to_quantize": ["MatMul"], "nodes_to_exclude": lm_head, "per_channel": True, "weight_type": QuantType.QInt8}
    dynamic, static = folder / "dynamic.onnx", folder / "static.onnx"

    def make_dynamic() -> Path:
        quantize_dynamic(folded, dynamic, **kind)
        return dynamic

    def make_static() -> Path:
        quantize_static(folded, static, Sequences(config, sequences), activation_type=QuantType.QInt8, **kind)
        return static

    return {"onnxruntime quantize_dynamic": make_dynamic, "onnxruntime quantize_static": make_static}


def by_modelopt(artifact: Path, folder: Path, sequences: Sequence[Ids], yardstick: Yardstick) -> TokenScores:
    """ModelOpt's scores; it calibrates on the sequences of full length.

    Raises:
        CalledProcessError: it can't be installed or fails; ``stderr`` says why.
    """
    checkpoint = write_checkpoint(artifact, folder / "checkpoint")
    windows, runs = yardstick.windows, yardstick.runs
    given = {
        "calibration": np.stack([ids for ids in sequences if len(ids) == max(map(len, sequences))]),
        "windows": np.stack([np.append(window.inputs, window.targets[-1]) for window in windows]),
        "reference": np.stack([run.final_hidden.float().numpy() for run in runs]),
    }
    np.savez(folder / "given.npz", **given)
    worker = Path(__file__).with_name("modelopt_worker.py")
    words = [_environment(folder / "modelopt"), worker, checkpoint, folder / "given.npz", folder / "scores.npz"]
    subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)
    found = np.load(folder / "scores.npz")
    return TokenScores(*(found[field].astype(np.float64) for field in ("nll", "kl", "best")), np.full(len(found["nll"]), np.nan))


def _environment(folder: Path) -> Path:
    """A Python with ModelOpt and PyTorch's CPU build, which goes in first: ModelOpt alone would pull the CUDA build."""
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.is_file():
        torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")) + "+cpu"
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, text=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        if subprocess.run([*install, torch], capture_output=True, check=False).returncode:  # as scripts/setup does
            subprocess.run([*install, torch, "--extra-index-url", CPU_WHEELS], check=True, capture_output=True, text=True)
        subprocess.run([*install, MODELOPT, torch, "transformers", "requests"], check=True, capture_output=True, text=True)
        stamp.touch()
    return python


def _products(graph: Path) -> list[str]:
    """Names of its MatMul nodes."""
    import onnx

    return [node.name for node in onnx.load(graph, load_external_data=False).graph.node if node.op_type == "MatMul"]
