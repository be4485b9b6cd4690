"""export: checkpoint → traced.onnx and weights/."""

from __future__ import annotations

from pathlib import Path

from artifact.io_spec import Dtype
from artifact.progress import Progress, silent
from artifact.steps import Outcome, Report, StepContext, check_belongs, run_step
from exporter.checkpoints import Checkpoint, open_checkpoint


def export(source: str, out: Path | None, *, dtype: Dtype = "fp16", force: bool = False, progress: Progress = silent) -> tuple[Path, Outcome]:
    """Export a checkpoint into an artifact folder.

    Args:
        source: a Hugging Face folder, a `.gguf` file, or `demo`.
        out: the artifact folder; None means `artifacts/<name>`.
        dtype: of weights and activations in the artifact.
        force: do it even where it is up to date, or the folder holds another checkpoint.
        progress: told what is being done.

    Returns:
        The folder, and what was done.
    """
    checkpoint, artifact = resolve(source, out, dtype, force=force, progress=progress)
    return artifact, export_into(artifact, checkpoint, dtype=dtype, force=force, progress=progress)


def resolve(source: str, out: Path | None, dtype: Dtype, *, force: bool, progress: Progress) -> tuple[Checkpoint, Path]:
    """Open the checkpoint, and find the folder that it may be exported into."""
    checkpoint = open_checkpoint(source, progress=progress)
    artifact = out or default_folder(checkpoint, dtype)
    check_belongs(artifact, checkpoint.fingerprint, force=force)
    return checkpoint, artifact


def export_into(artifact: Path, checkpoint: Checkpoint, *, dtype: Dtype, force: bool, progress: Progress) -> Outcome:
    """The export step."""

    def work(step: StepContext) -> Report:
        from exporter.export import export_checkpoint  # torch.onnx takes seconds to import

        return export_checkpoint(step, checkpoint, dtype=dtype)

    options = {"checkpoint": checkpoint.fingerprint, "state": checkpoint.state, "dtype": dtype}
    return run_step(artifact, "export", options, work, force=force, progress=progress)


def default_folder(checkpoint: Checkpoint, dtype: Dtype) -> Path:
    """`artifacts/<name>`; an fp32 artifact stands beside the fp16 one."""
    return Path("artifacts") / (checkpoint.name if dtype == "fp16" else f"{checkpoint.name}-{dtype}")
