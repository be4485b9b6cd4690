"""run: all five steps, each done only where something it depends on has changed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from artifact.calibration import calibration_step
from artifact.errors import UsageError
from artifact.manifest import locked, read_manifest
from artifact.progress import Progress, silent
from artifact.stale import stale_steps
from artifact.steps import Outcome, Report
from artifact.unread import spend_step
from commands.buckets import build_all, check_lengths
from commands.build import BuildOptions, check_precision
from commands.calibrate import CalibrationOptions
from commands.export import ExportOptions, export_into, resolve
from commands.graphs import SCHEMES, fuse, quantize
from commands.placement import PlacementOptions
from commands.validate import ValidateOptions, validate
from engines.build import choose_backend
from engines.decode_gemv import check_gemv
from exporter.checkpoints import CheckpointRequest, pin_request


@dataclass(frozen=True)
class RunOptions:
    """Of the artifact, of the precisions that look at activations (on what, and where they stop), of every engine, and of the report."""

    export: ExportOptions = field(default_factory=ExportOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    placement: PlacementOptions = field(default_factory=PlacementOptions)
    build: BuildOptions = field(default_factory=BuildOptions)
    validate: ValidateOptions = field(default_factory=ValidateOptions)


def run(
    request: CheckpointRequest,
    out: Path | None,
    precisions: tuple[str, ...],
    options: RunOptions | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Report:
    """Export, fuse, quantise, build and validate.

    Args:
        request: the checkpoint.
        out: the artifact folder; None means `artifacts/<name>`.
        precisions: engines to build; empty means the artifact's own dtype.
        options: of the steps.
        force: do every step, up to date or not.
        progress: told what is being done.

    Returns:
        artifact, passed, seconds, steps [{step, done, reason, seconds}], deleted {file: bytes}, and each step's own report under its name.

    Raises:
        UsageError: there is nothing to build from.
        EngineError: a bound of the other cache form, a static cache without its capacity, or no backend that can build what is asked; before
            anything is exported.
        ToolkitError: as each step.
    """
    start = time.perf_counter()
    options = options or RunOptions()
    exported, built = options.export, options.build
    _check_runnable(exported)
    choose_backend(built.backend, built.flags)
    wanted = tuple(dict.fromkeys(precisions)) or (exported.dtype,)
    for precision in wanted:
        check_precision(exported.dtype, precision)
        if built.flags.decode_gemv:
            check_gemv(precision, built.parts, packed=exported.weights != "reference")
    request = pin_request(request, progress=progress)
    checkpoint, artifact = resolve(request, out, exported, force=force, progress=progress)
    check_lengths(built, exported.kv_cache, checkpoint.config)
    with locked(artifact):
        outcomes = {"export": export_into(artifact, checkpoint, request, exported, force=force, progress=progress)}
        outcomes |= _after_export(artifact, wanted, replace(options, validate=replace(options.validate, checkpoint=request.source)), force, progress)
        passed = _passed(outcomes)
        deleted = {} if passed is False else _delete_calibrations(artifact, wanted)
    return {
        "artifact": str(artifact),
        "passed": passed,
        "seconds": round(time.perf_counter() - start, 1),
        "steps": [{"step": name, "done": not outcome.up_to_date, "reason": outcome.reason or "up to date"} for name, outcome in outcomes.items()],
        "deleted": deleted,
        **{name: outcome.report for name, outcome in outcomes.items()},
    }


def _after_export(artifact: Path, wanted: tuple[str, ...], options: RunOptions, force: bool, progress: Progress) -> dict[str, Outcome]:
    """Fuse, quantise and build each precision, and validate all."""
    outcomes = {"fuse": fuse(artifact, force=force, progress=progress)}
    schemes = [one for one in wanted if one in SCHEMES["tensorrt"]]
    firsts = {calibration_step(one): one for one in reversed(schemes)}.values()  # what one of them measures anew serves all that read it
    asked: dict[str, Any] = {"calibration": options.calibration, "placement": options.placement, "progress": progress}
    for scheme in schemes:
        outcomes[f"quantize-{scheme}"] = quantize(artifact, scheme=scheme, force=force, recalibrate=force and scheme in firsts, **asked)
    stale = stale_steps(artifact, read_manifest(artifact))  # statistics that were deleted and measured again may be others
    for scheme in (one for one in schemes if f"quantize-{one}" in stale):
        outcomes[f"quantize-{scheme}"] = quantize(artifact, scheme=scheme, force=False, **asked)
    for precision in wanted:
        outcomes[f"build-{precision}"] = build_all(artifact, precision, options.build, force=force, progress=progress)
    return outcomes | {"validate": validate(artifact, options.validate, force=force, progress=progress)}


def _delete_calibrations(artifact: Path, wanted: tuple[str, ...]) -> dict[str, int]:
    """What activations were measured into, larger than a small model's weights, and read no more: a change that needs it measures it again."""
    steps = sorted({calibration_step(one) for one in wanted if one in SCHEMES["tensorrt"]})
    return {file: size for step in steps for file, size in spend_step(artifact, step).items()}


def _check_runnable(options: ExportOptions) -> None:
    """Refuse before anything is read what a later step would refuse.

    Raises:
        UsageError: there is nothing to build from.
    """
    if options.weights == "none":
        raise UsageError("run needs the weights; --weights none writes the graph alone", hint="python cli.py export … --weights none")


def _passed(outcomes: dict[str, Outcome]) -> bool | None:
    """False where a report says so; otherwise what the parity report says."""
    if any(outcome.report.get("passed") is False for outcome in outcomes.values()):
        return False
    passed: bool | None = outcomes["validate"].report["passed"]
    return passed
