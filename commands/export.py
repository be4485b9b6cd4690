"""export: checkpoint → traced.onnx and weights/."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from artifact.errors import ArtifactError
from artifact.io_spec import Dtype, KvCache
from artifact.ownership import check_belongs
from artifact.progress import Progress, silent
from artifact.steps import Outcome, Report, StepContext, run_step
from artifact.tensor_file import WeightsMode
from engines.preflight import check_memory
from engines.step_costs import export_cost
from exporter.checkpoints import Checkpoint, CheckpointRequest, open_request, pin_request
from exporter.checkpoints.protocol import InFiles


@dataclass(frozen=True)
class ExportOptions:
    """What decides an export of a checkpoint.

    Attributes:
        dtype: of weights and activations in the artifact.
        kv_cache: form of its graphs' cache.
        weights: copied, referred to where the checkpoint has them, or left out.
    """

    dtype: Dtype = "fp16"
    kv_cache: KvCache = "dynamic"
    weights: WeightsMode = "copy"


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
    if options.weights == "reference":
        from exporter.in_place import check_in_place

        artifact = check_in_place(checkpoint, request, out, options.dtype)
    else:
        artifact = out or default_folder(checkpoint, options)
        if isinstance(checkpoint, InFiles) and artifact.resolve() == checkpoint.folder.resolve():
            hint = "choose another --out, or --weights reference to use its weights where they are"
            raise ArtifactError(f"{artifact} is the checkpoint's own folder, which an export must not alter", hint=hint)
    check_belongs(artifact, checkpoint.fingerprint, force=force, weights=options.weights)
    return checkpoint, artifact


def export_into(
    artifact: Path, checkpoint: Checkpoint, request: CheckpointRequest, options: ExportOptions, *, force: bool, progress: Progress
) -> Outcome:
    """The export step."""

    def work(step: StepContext) -> Report:
        from exporter.export import export_checkpoint  # torch.onnx takes seconds to import

        check_memory(export_cost(checkpoint.config, options.dtype), artifact)  # what is written already counts too: export looks at the disk itself
        return export_checkpoint(step, checkpoint, request=request, dtype=options.dtype, kv_cache=options.kv_cache, weights=options.weights)

    recorded = {"checkpoint": checkpoint.fingerprint, "state": checkpoint.state, **asdict(options)}
    return run_step(artifact, "export", recorded, work, force=force, progress=progress)


def default_folder(checkpoint: Checkpoint, options: ExportOptions) -> Path:
    """`artifacts/<name>`; an fp32 artifact, and one with a static cache, stands beside it."""
    variant = [name for name in (options.dtype, options.kv_cache) if name not in ("fp16", "dynamic")]
    return Path("artifacts") / "-".join([checkpoint.name, *variant])
