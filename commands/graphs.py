"""fuse and quantize: ONNX → ONNX inside an artifact; fuse also from any ONNX file to another."""

from __future__ import annotations

from pathlib import Path

from artifact.errors import QuantizationError
from artifact.manifest import require_artifact
from artifact.progress import Progress, silent
from artifact.steps import Outcome, Report, StepContext, require, run_step
from artifact.tensor_file import read_checksums
from artifact.weight_files import check_weight_files

SCHEMES = ("int8",)


def fuse(
    artifact: Path,
    *,
    target: str = "tensorrt",
    allow_partial: bool = False,
    min_tensorrt: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Rewrite traced.onnx into fused.onnx with the target's operators; only with those of an older TensorRT release if one is named."""
    check_weight_files(artifact, require_artifact(artifact, "fuse"))

    def work(step: StepContext) -> Report:
        from graphs.pipeline import fuse_artifact

        return fuse_artifact(step, target=target, allow_partial=allow_partial, min_tensorrt=min_tensorrt)

    options = {"target": target, "allow_partial": allow_partial, "min_tensorrt": min_tensorrt}
    return run_step(artifact, "fuse", options, work, force=force, progress=progress)


def fuse_file(
    graph: Path,
    out: Path,
    *,
    target: str = "tensorrt",
    allow_partial: bool = False,
    min_tensorrt: str | None = None,
    progress: Progress = silent,
) -> Report:
    """Rewrite any decoder's ONNX file into another one with the target's operators; no artifact is needed."""
    from graphs.foreign.fuse import fuse_graph

    return fuse_graph(graph, out, target=target, allow_partial=allow_partial, min_tensorrt=min_tensorrt, progress=progress)


def quantize(artifact: Path, *, scheme: str = "int8", force: bool = False, progress: Progress = silent) -> Outcome:
    """Quantise fused.onnx; writes `<scheme>.onnx` and its weights."""
    require_artifact(artifact, "quantize", weights=True)
    if scheme not in SCHEMES:
        raise QuantizationError(f"no scheme {scheme!r}; there is: {', '.join(SCHEMES)}")

    def work(step: StepContext) -> Report:
        from graphs.quantize.int8 import quantize_int8

        for file in sorted({tensor.file for tensor in read_checksums(artifact).values()}):
            require(artifact, file)
        return quantize_int8(step)

    return run_step(artifact, f"quantize-{scheme}", {"scheme": scheme}, work, force=force, progress=progress)
