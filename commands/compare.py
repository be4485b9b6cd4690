"""validate --against a graph, an artifact or kept predictions: no reference is run, and no checkpoint is needed but for the shape of a lone file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifact.config import LlamaConfig
from artifact.errors import UsageError, ValidationError
from artifact.manifest import MANIFEST, Manifest, require_artifact
from artifact.progress import Progress, silent
from artifact.steps import Report
from commands.against import Against
from engines.preflight import check_memory
from engines.step_costs import validate_cost

if TYPE_CHECKING:
    from commands.validate import ValidateOptions
    from validation.comparison import Subject
    from validation.side import Side

IDENTITY = ("name", "source", "format", "fingerprint")
"""Of a model, as the report names it."""


def compare(target: Path, options: ValidateOptions, *, out: Path | None = None, progress: Progress = silent) -> Report:
    """Hold an artifact's stages, or one ONNX file, against what ``--against`` names, and write the reports.

    Raises:
        UsageError: options that don't go together, or a lone file whose model nobody says.
        ValidationError: another model, shape or tokenizer; a stage that is not there.
    """
    against = options.against
    assert against is not None
    assert against.path is not None
    _check_options(target, options, against)
    if against.kind == "kept":
        return _by_kept(target, options, against.path, out, progress)
    return _by_graph(target, options, against.path, out, progress)


def _check_options(target: Path, options: ValidateOptions, against: Against) -> None:
    """Refuse an option that would be dropped."""
    kept, whole = against.kind == "kept", target.is_dir()
    why = "the file has its own tokens, limits and model" if kept else "no reference is run"
    of_whole = {"--checkpoint": whole and not kept and options.checkpoint is not None}
    of_file = {"--stage": not whole and bool(options.stages), "--streamed": not whole and options.streamed is not None}
    of_file["--device cuda"] = not whole and options.device != "cpu"
    given = {
        "--device cuda": options.device != "cpu" and not kept,
        "--bisect": options.bisect,
        "--edges": options.edges,
        "--baseline": options.baseline is not None,
        "--save-reference": options.save_reference is not None,
        "--top-k": options.top_k is not None,
        "--max-kl": kept and options.max_kl is not None,
        "--text": kept and bool(options.texts),
        "--tokens": kept and options.tokens is not None,
        "--checkpoint": kept and options.checkpoint is not None,
    }
    reasons = {why: given, f"{target} says which model it is": of_whole, f"{target} is one graph, loaded whole": of_file}
    wrong = [(name, reason) for reason, names in reasons.items() for name, is_given in names.items() if is_given]
    if wrong:
        name, reason = wrong[0]
        raise UsageError(f"--against {against.path} and {name} don't go together: {reason}", hint=f"leave out {name}")


@dataclass(frozen=True)
class _Other:
    """What a graph is held against; ``artifact`` and its manifest are None where it lies in none."""

    path: Path
    artifact: Path | None
    manifest: Manifest | None

    @property
    def model(self) -> Report | None:
        """Of the manifest."""
        return None if self.manifest is None else self.manifest["model"]

    @property
    def name(self) -> str:
        """``llama-2-7b``, ``llama-2-7b/fused.onnx`` of a file."""
        whole = self.path.resolve()
        return whole.name if self.path.is_dir() else f"{whole.parent.name}/{whole.name}"


def _by_kept(target: Path, options: ValidateOptions, path: Path, out: Path | None, progress: Progress) -> Report:
    from engines.device import find_device
    from validation.comparison import artifact_subject, file_subject
    from validation.kept.file import read_kept
    from validation.kept.report import judge_by_kept, require_same_model

    kept = read_kept(path)
    if target.is_dir():
        manifest = require_artifact(target, "validate", weights=True)
        require_same_model(manifest["model"], kept, path)
        subject = artifact_subject(target, manifest, list(options.stages) or None, streamed=options.streamed, progress=progress)
    else:
        subject = file_subject(target, kept.config, dict(kept.model), progress)
    device = find_device() if options.device == "cuda" else None
    return judge_by_kept(subject, path, kept, out=out, progress=progress, device=device)


def _by_graph(target: Path, options: ValidateOptions, path: Path, out: Path | None, progress: Progress) -> Report:
    import tempfile

    from validation.pair.report import Asked, compare_graphs, require_same_shape

    folder = next((folder for folder in (path, path.parent) if (folder / MANIFEST).is_file()), None)
    other = _Other(path, folder, None if folder is None else require_artifact(folder, "validate", weights=True))
    with tempfile.TemporaryDirectory(prefix="llama2trt-") as scratch:
        subject, tokenizer = _subject(target, options, other, Path(scratch), progress)
        config = subject.sides[0].config
        check_memory(validate_cost(config, whole=not subject.streamed), subject.folder)
        if other.model is not None:
            require_same_shape(config, LlamaConfig(**other.model["config"]), str(path), there=other.artifact, here=tokenizer)
        subject, others = _others(subject, other, config, asked=bool(options.stages))
        known = _known(other, next(iter(others.values())), progress)
        asked = Asked(options.texts or None, options.tokens, options.max_kl, tokenizer, out)
        return compare_graphs(subject, others, {"name": other.name, **known}, asked, progress)


def _subject(target: Path, options: ValidateOptions, other: _Other, scratch: Path, progress: Progress) -> tuple[Subject, Path]:
    """What is compared, and the folder of its tokenizer; a lone file's model is the checkpoint's, or that of the artifact that it is held against."""
    from artifact.steps import StepContext
    from exporter.checkpoints import CheckpointRequest, open_request
    from validation.comparison import artifact_subject, file_subject

    if target.is_dir():
        manifest = require_artifact(target, "validate", weights=True)
        return artifact_subject(target, manifest, list(options.stages) or None, streamed=options.streamed, progress=progress), target
    if options.checkpoint is not None:
        checkpoint = open_request(CheckpointRequest(options.checkpoint), progress=progress)
        checkpoint.write_sidecars(StepContext(scratch, progress).write)
        model = {key: getattr(checkpoint, key) for key in IDENTITY}
        return file_subject(target, checkpoint.config, model, progress), scratch
    if other.artifact is None or other.model is None:
        raise UsageError(f"nothing says which model {target} and {other.path} are of", hint="--checkpoint SRC, or hold them against an artifact")
    config = LlamaConfig(**other.model["config"])
    return file_subject(target, config, {key: other.model[key] for key in IDENTITY}, progress), other.artifact


def _others(subject: Subject, other: _Other, config: LlamaConfig, *, asked: bool) -> tuple[Subject, dict[str, Side]]:
    """What each side is held against; sides that an artifact has no stage for are not run."""
    from validation.side import file_side, stage_side
    from validation.tolerances import kind_of

    path, manifest = other.path, other.manifest
    if not path.is_dir():
        stage = manifest is not None and kind_of(path.stem, manifest["model"]["dtype"]) is not None
        theirs = stage_side(path.parent, manifest, path.stem) if manifest and stage else file_side(path, config, str(path))
        return subject, {side.name: theirs for side in subject.sides}
    assert manifest is not None
    if any(side.lone for side in subject.sides):
        raise UsageError(f"--against {path}: which of its stages?", hint=f"--against {path}/fused.onnx")
    found = {side.name: stage_side(path, manifest, side.name) for side in subject.sides if (path / f"{side.name}.onnx").is_file()}
    missing = [side.name for side in subject.sides if side.name not in found]
    if missing and (asked or not found):
        raise ValidationError(f"{path} has no {missing[0]}.onnx", hint=f"--stage names one that both have, or --against {path}/STAGE.onnx")
    idle = [{"stage": name, "reason": f"{path.name} has no {name}.onnx"} for name in missing]
    sides = [side for side in subject.sides if side.name in found]
    return replace(subject, sides=sides, not_run=[*subject.not_run, *idle]), found


def _known(other: _Other, side: Side, progress: Progress) -> dict[str, Any]:
    """What the report says of the other: model, and stored bytes checked, of an artifact; hashes of a lone file."""
    from validation.checksums import verify_checksums

    hashes = {"hashes": side.lone.describe(progress)["hashes"]} if side.lone else {}
    if other.artifact is None or other.manifest is None:
        return hashes
    model = {key: other.manifest["model"][key] for key in ("name", "fingerprint", "dtype")}
    return {"model": model, "checksums": verify_checksums(other.artifact, other.manifest, progress).as_report(), **hashes}
