"""fuse and quantize: ONNX → ONNX inside an artifact; fuse also from any ONNX file to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from artifact.errors import QuantizationError
from artifact.manifest import locked, read_manifest, require_artifact
from artifact.progress import Progress, silent
from artifact.step_kinds import CALIBRATION
from artifact.steps import Outcome, Report, StepContext, forget_step, require, run_step
from artifact.tensor_file import read_checksums
from artifact.weight_files import check_weight_files
from commands.calibrate import CalibrationOptions, calibrate, why_plain

if TYPE_CHECKING:
    from graphs.quantize.statistics import Statistics

SCHEMES: dict[str, tuple[str, ...]] = {"tensorrt": ("int8", "int8-smoothquant", "int4"), "onnxruntime": ("int8", "int4")}
"""Target → what it can be quantised to."""
NEEDS_ACTIVATIONS = ("int8-smoothquant",)
"""Schemes that can't do without calibration."""
SOURCES = {"tensorrt": "fused.onnx", "onnxruntime": "fused-onnxruntime.onnx"}


def fuse(
    artifact: Path,
    *,
    target: str = "tensorrt",
    allow_partial: bool = False,
    min_tensorrt: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Rewrite traced.onnx into the target's fused graph; only with operators of an older TensorRT release if one is named."""
    check_weight_files(artifact, require_artifact(artifact, "fuse"))

    def work(step: StepContext) -> Report:
        from graphs.pipeline import fuse_artifact

        return fuse_artifact(step, target=target, allow_partial=allow_partial, min_tensorrt=min_tensorrt)

    options = {"target": target, "allow_partial": allow_partial, "min_tensorrt": min_tensorrt}
    return run_step(artifact, _step_id("fuse", target), options, work, force=force, progress=progress)


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


def quantize(
    artifact: Path,
    *,
    scheme: str = "int8",
    target: str = "tensorrt",
    calibration: CalibrationOptions | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Quantise the target's fused graph, calibrated where it can be; writes `<scheme>.onnx` or `<scheme>-onnxruntime.onnx`."""
    require_artifact(artifact, "quantize", weights=True)
    if scheme not in SCHEMES.get(target, ()):
        known = "; ".join(f"{name}: {', '.join(schemes)}" for name, schemes in SCHEMES.items())
        raise QuantizationError(f"no scheme {scheme!r} for target {target!r}; there are: {known}")
    options = {"scheme": scheme} if target == "tensorrt" else {"scheme": scheme, "target": target}
    step_id = _step_id(f"quantize-{scheme}", target)
    with locked(artifact):
        wanted = calibration or CalibrationOptions()
        plainly = why_plain(artifact, wanted)
        if plainly is not None and scheme in NEEDS_ACTIVATIONS:
            raise QuantizationError(f"{scheme} rounds activations by scales that are measured: {plainly}", hint="--scheme int8 is weight-only")
        require(artifact, SOURCES[target])
        if plainly is None:
            calibrate(artifact, wanted, force=force, progress=progress)
        inputs = (SOURCES[target],) if plainly is not None else (SOURCES[target], CALIBRATION)
        outcome = run_step(
            artifact, step_id, options | wanted.recorded(), _work(scheme, target, plainly), inputs=inputs, force=force, progress=progress
        )
        forget_step(artifact, "calibrate")
    return outcome


def _work(scheme: str, target: str, plainly: str | None) -> Callable[[StepContext], Report]:
    """What writes a quantised graph; the report says on what it was calibrated, or why not."""

    def work(step: StepContext) -> Report:
        for file in sorted({tensor.file for tensor in read_checksums(step.artifact).values()}):
            require(step.artifact, file)
        from graphs.quantize.statistics import Statistics

        write = _writer(scheme, target)
        if plainly is not None:
            return write(step, None) | {"calibration": {"text": None, "reason": plainly}}
        measured = read_manifest(step.artifact)["steps"]["calibrate"]["report"]
        return write(step, Statistics(step.artifact / CALIBRATION)) | {"calibration": measured}

    return work


def _writer(scheme: str, target: str) -> Callable[[StepContext, Statistics | None], Report]:
    """What writes the graph of a scheme, from statistics or plainly."""
    if target == "onnxruntime":
        from graphs.quantize.blocks import quantize_blocks

        return lambda step, statistics: quantize_blocks(step, scheme, statistics)
    from graphs.quantize.int4 import quantize_int4
    from graphs.quantize.int8 import quantize_int8
    from graphs.quantize.int8_smoothquant import quantize_int8_smoothquant

    writers: dict[str, Callable[[StepContext, Statistics | None], Report]] = {
        "int8": quantize_int8,
        "int8-smoothquant": quantize_int8_smoothquant,
        "int4": quantize_int4,
    }
    return writers[scheme]


def _step_id(name: str, target: str) -> str:
    """Each target's step is recorded apart; TensorRT's has the plain name."""
    return name if target == "tensorrt" else f"{name}-{target}"
