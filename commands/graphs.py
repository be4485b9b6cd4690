"""fuse and quantize: ONNX → ONNX inside an artifact; fuse also from any ONNX file to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifact.calibration import CALIBRATION, STATIC, calibration_file, calibration_step
from artifact.config import LlamaConfig
from artifact.errors import ArtifactError, QuantizationError, UsageError
from artifact.given import given_of
from artifact.manifest import locked, read_manifest, require_artifact
from artifact.progress import Progress, silent
from artifact.steps import Outcome, Report, StepContext, require, run_step, why_to_do
from artifact.tensor_file import read_checksums
from artifact.unread import forget_step, is_spent
from artifact.weight_files import check_weight_files
from commands.calibrate import TAKEN, CalibrationOptions, calibrate, why_plain
from commands.placement import OpenModel, PlacementOptions, check_placeable, decide, measured_text, score
from commands.placement_model import Model, smooth
from engines.one_position import write_one_position
from engines.placement_costs import placement_costs
from engines.preflight import check_memory, check_step
from engines.step_costs import fuse_cost, quantize_cost

if TYPE_CHECKING:
    from graphs.quantize.statistics import Statistics

Kept = Mapping[str, str]
"""Module path of a linear that is not quantised → why."""
Write = Callable[[StepContext, "Statistics | None", Kept, Any], Report]
SCHEMES: dict[str, tuple[str, ...]] = {"tensorrt": ("int8", "int8-smoothquant", "int4"), "onnxruntime": ("int8", "int4")}
"""Target → what it can be quantised to; all of them look at activations before they round."""
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

        check_memory(fuse_cost(LlamaConfig(**read_manifest(step.artifact)["model"]["config"])), step.artifact)
        report = fuse_artifact(step, target=target, allow_partial=allow_partial, min_tensorrt=min_tensorrt)
        return report if target == "tensorrt" else report | write_one_position(step, "fused-onnxruntime")

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
    placement: PlacementOptions | None = None,
    force: bool = False,
    recalibrate: bool | None = None,
    progress: Progress = silent,
) -> Outcome:
    """Quantise the target's fused graph; what can't be is refused before anything is measured. ``recalibrate``: calibrate anew; None as ``force``."""
    require_artifact(artifact, "quantize", weights=True)
    if scheme not in SCHEMES.get(target, ()):
        known = "; ".join(f"{name}: {', '.join(schemes)}" for name, schemes in SCHEMES.items())
        raise QuantizationError(f"no scheme {scheme!r} for target {target!r}; there are: {known}")
    given = given_of(read_manifest(artifact)["model"])
    if given is not None:
        _check_given(artifact, scheme, target, placement)
    wanted, placing = calibration or CalibrationOptions(), placement or PlacementOptions()
    options = {"scheme": scheme} if target == "tensorrt" else {"scheme": scheme, "target": target}
    step_id, graph = _step_id(f"quantize-{scheme}", target), SOURCES[target]
    with locked(artifact):
        require(artifact, graph)
        open_model = cache(lambda: Model.open(artifact, scheme, graph))  # once, and when its statistics are there
        limit_pct = None if given else placing.limit_pct(scheme)
        plan = _Plan(scheme, target, wanted, placing, open_model, why_plain(artifact, wanted), limit_pct, given=given is not None)
        _refuse(artifact, plan)
        options |= wanted.recorded() | placing.recorded(plan.limit_pct)
        inputs = (graph, *_measured(plan))
        again = force if recalibrate is None else recalibrate
        gone = is_spent(artifact, calibration_step(scheme)) and (force or _is_to_do(artifact, step_id, options, inputs))
        _measure(artifact, plan, graph, force=force, recalibrate=again or gone, progress=progress)
        older = scheme in STATIC and CALIBRATION in read_manifest(artifact)["steps"].get(step_id, {}).get("inputs", ())  # before it had its own
        outcome = run_step(artifact, step_id, options, _work(plan), inputs=inputs, force=force, progress=progress)
        for unread in (f"sensitivity-{scheme}", f"smoothing-{scheme}", calibration_step(scheme), *(["calibrate"] if older else [])):
            forget_step(artifact, unread)
    return outcome


def _measure(artifact: Path, plan: _Plan, graph: str, *, force: bool, recalibrate: bool, progress: Progress) -> None:
    """Calibrate, smooth and score, as far as the plan asks for it."""
    from graphs.quantize.smoothing_file import SMOOTHED

    if plan.plainly is None:
        calibrate(artifact, plan.scheme, plan.calibration, force=recalibrate, progress=progress)
    if plan.limit_pct is not None:
        if plan.scheme in SMOOTHED:
            smooth(artifact, plan.scheme, graph, force=force, progress=progress)
        score(artifact, plan.scheme, graph, plan.open_model, plan.placing, plan.calibration, force=force, progress=progress)


def _is_to_do(artifact: Path, step_id: str, options: dict[str, Any], inputs: tuple[str, ...]) -> bool:
    """Whether a step would be done; also where what it reads was changed by hand, which the steps before mend."""
    try:
        return bool(why_to_do(artifact, step_id, options, inputs))
    except ArtifactError:
        return True


def _measured(plan: _Plan) -> Iterator[str]:
    """The files of what is measured before."""
    from graphs.quantize.sensitivities import scores_file
    from graphs.quantize.smoothing_file import SMOOTHED, smoothing_file

    if plan.plainly is None:
        yield calibration_file(plan.scheme)
    if plan.limit_pct is not None:
        yield from ([smoothing_file(plan.scheme)] if plan.scheme in SMOOTHED else [])
        yield scores_file(plan.scheme)


def _refuse(artifact: Path, plan: _Plan) -> None:
    """What can't come of it, before minutes of measuring and not after."""
    from graphs.quantize.refusals import check_graph

    if plan.plainly not in (None, TAKEN) and plan.scheme in STATIC:
        short = f"{plan.scheme} rounds activations by scales that are measured: {plan.plainly}"
        raise QuantizationError(short, hint="--scheme int8 is weight-only")
    if not plan.given:
        check_placeable(plan.scheme, plan.target, plan.placing, plan.plainly)
    check_graph(artifact, plan.scheme, plan.target)
    if plan.limit_pct is not None:
        config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
        for cost in placement_costs(config):
            check_memory(cost, artifact)
        measured_text(artifact, config, plan.scheme, plan.placing, plan.calibration)


def _check_given(artifact: Path, scheme: str, target: str, placement: PlacementOptions | None) -> None:
    """What can't be asked for where the checkpoint brought levels."""
    from graphs.quantize.given import check_scheme

    check_scheme(artifact, scheme, target)
    if placement is not None and placement.given:
        raise UsageError(f"{artifact}: {TAKEN}; there is nothing to place", hint=f"leave out {placement.given}")


@dataclass(frozen=True)
class _Plan:
    """How to quantise: on what, why not calibrated, if not; within which limit, if any; and whether the checkpoint brought levels."""

    scheme: str
    target: str
    calibration: CalibrationOptions
    placing: PlacementOptions
    open_model: OpenModel
    plainly: str | None
    limit_pct: float | None
    given: bool


def _work(plan: _Plan) -> Callable[[StepContext], Report]:
    """What writes a quantised graph; where it is calibrated, the report says on what, or why not."""

    def work(step: StepContext) -> Report:
        for file in sorted({tensor.file for tensor in read_checksums(step.artifact).values()}):
            require(step.artifact, file)
        from graphs.quantize.statistics import Statistics

        _check_room(step.artifact, plan)
        write = _writer(plan.scheme, plan.target, given=plan.given)
        if plan.plainly is not None:
            return write(step, None, {}, None) | {"calibration": {"text": None, "reason": plan.plainly}}
        statistics = Statistics(step.artifact / calibration_file(plan.scheme))
        about = {"calibration": read_manifest(step.artifact)["steps"][calibration_step(plan.scheme)]["report"]}
        kept: dict[str, str] = {}
        smoothing = None
        if plan.limit_pct is not None:
            model = plan.open_model()
            kept, about["placement"] = decide(step, plan.scheme, model, plan.limit_pct, plan.placing, plan.calibration)
            smoothing = model.forms.smoothing
        return write(step, statistics, kept, smoothing) | about

    return work


def _check_room(artifact: Path, plan: _Plan) -> None:
    """Memory, and disk for what is not there from an earlier run."""
    config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
    written = sum(path.stat().st_size for path in artifact.glob(f"weights/{plan.scheme}-*.safetensors"))
    cost = quantize_cost(config, plan.scheme, calibrated=plan.plainly is None, head=plan.target == "onnxruntime")
    check_step(cost, artifact, replaced=written)


def _writer(scheme: str, target: str, *, given: bool) -> Write:
    """What writes the graph of a scheme: from statistics or plainly, but for what is kept, with what was searched for it already."""
    if target == "onnxruntime":
        from graphs.quantize.blocks import quantize_blocks

        graph = f"{scheme}-onnxruntime"
        return lambda step, statistics, kept, found: quantize_blocks(step, scheme, statistics) | write_one_position(step, graph)
    if scheme == "int8-smoothquant" and given:
        from graphs.quantize.given_islands import quantize_given_islands

        return lambda step, statistics, kept, found: quantize_given_islands(step, statistics)
    if scheme == "int8-smoothquant":
        from graphs.quantize.int8_smoothquant import quantize_int8_smoothquant

        return lambda step, statistics, kept, found: quantize_int8_smoothquant(step, statistics, kept=kept, found=found)
    if scheme == "int4":
        from graphs.quantize.int4 import quantize_int4

        return lambda step, statistics, kept, found: quantize_int4(step, statistics)
    from graphs.quantize.int8 import quantize_int8

    return lambda step, statistics, kept, found: quantize_int8(step, statistics, kept)


def _step_id(name: str, target: str) -> str:
    """Each target's step is recorded apart; TensorRT's has the plain name."""
    return name if target == "tensorrt" else f"{name}-{target}"
