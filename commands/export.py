"""export: checkpoint → traced.onnx and weights/."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from artifact.io_spec import Dtype
from artifact.progress import Progress, silent
from artifact.steps import Outcome, Report, StepContext, check_belongs, run_step
from exporter.checkpoints import Checkpoint, CheckpointRequest, open_request, pin_request


@dataclass(frozen=True)
class ExportOptions:
    """What decides an export of a checkpoint: ``dtype`` of weights and activations in the artifact."""

    dtype: Dtype = "fp16"


def export(
    request: CheckpointRequest, out: Path | None, options: ExportOptions, *, force: bool = False, progress: Progress = silent
) -> tuple[Path, Outcome]:
    """Export a checkpoint into an artifact folder.

    Args:
        request: which checkpoint.
        out: the artifact folder; None means `artifacts/<name>`.
        options: what is made of it.
        force: do it even where it is up to date, or the folder holds another checkpoint.
        progress: told what is being done.

    Returns:
        The folder, and what was done.
    """
    request = pin_request(request, progress=progress)
    checkpoint, artifact = resolve(request, out, options, force=force, progress=progress)
    return artifact, export_into(artifact, checkpoint, request, options, force=force, progress=progress)


def resolve(request: CheckpointRequest, out: Path | None, options: ExportOptions, *, force: bool, progress: Progress) -> tuple[Checkpoint, Path]:
    """Open the checkpoint, and find the folder that it may be exported into."""
    checkpoint = open_request(request, progress=progress)
    artifact = out or default_folder(checkpoint, options.dtype)
    check_belongs(artifact, checkpoint.fingerprint, force=force)
    return checkpoint, artifact


def export_into(
    artifact: Path, checkpoint: Checkpoint, request: CheckpointRequest, options: ExportOptions, *, force: bool, progress: Progress
) -> Outcome:
    """The export step."""

    def work(step: StepContext) -> Report:
        from exporter.export import export_checkpoint  # torch.onnx takes seconds to import

        return export_checkpoint(step, checkpoint, request=request, dtype=options.dtype)

    recorded = {"checkpoint": checkpoint.fingerprint, "state": checkpoint.state, **asdict(options)}
    return run_step(artifact, "export", recorded, work, force=force, progress=progress)


def default_folder(checkpoint: Checkpoint, dtype: Dtype) -> Path:
    """`artifacts/<name>`; an fp32 artifact stands beside the fp16 one."""
    return Path("artifacts") / (checkpoint.name if dtype == "fp16" else f"{checkpoint.name}-{dtype}")
