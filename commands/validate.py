"""validate: every stage of an artifact against the reference model; or one ONNX file, ours or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifact.config import LlamaConfig
from artifact.engine_names import has_gemv, is_engine, stage_of
from artifact.errors import CheckpointError, UsageError, ValidationError
from artifact.hashing import sha256_of
from artifact.manifest import require_artifact
from artifact.progress import Progress, silent
from artifact.steps import Outcome, Report, StepContext, run_step
from commands.against import TRANSFORMERS, Against
from engines.closer_cost import closer_memory
from engines.decode_gemv import products_bytes
from engines.preflight import check_memory
from engines.step_cost import StepCost
from engines.step_costs import validate_cost
from exporter.checkpoints import Checkpoint, CheckpointRequest, open_request

if TYPE_CHECKING:
    from validation.baseline_file import Baseline
    from validation.manner import Manner
    from validation.transformers_model import TransformersModel


@dataclass(frozen=True)
class ValidateOptions:
    """What decides a report.

    Attributes:
        stages: empty means all that are there.
        texts: empty means the committed ones; ``tokens`` of them together are scored.
        checkpoint: where the checkpoint is now, if it moved; None means where it was exported from.
        device: ``cuda`` runs the plans too, where there is their GPU.
        baseline: the parity.json of an older run; what became worse fails.
        streamed: whether graphs are run one layer at a time; None is where they would take too much of the memory.
        bisect: whether each stage is narrowed to the node where it parts from the model.
        edges: whether each stage is tried at the edges of its plans' profiles.
        against: what else to hold the reference or the stages against.
        max_kl: of a comparison with another graph: the largest mean divergence, nats.
        save_reference: where the reference's predictions are kept; ``top_k`` best tokens of each position.
    """

    stages: tuple[str, ...] = ()
    texts: tuple[Path, ...] = ()
    tokens: int | None = None
    checkpoint: str | None = None
    device: str = "cpu"
    baseline: Path | None = None
    streamed: bool | None = None
    bisect: bool = False
    edges: bool = False
    against: Against | None = None
    max_kl: float | None = None
    save_reference: Path | None = None
    top_k: int | None = None

    def recorded_besides(self) -> dict[str, Any]:
        """What else decides the report, for the manifest; nothing where nothing else was asked for."""
        against = {} if self.against is None else {"against": self.against.kind}
        return against | ({} if self.save_reference is None else {"save_reference": str(self.save_reference), "top_k": self.top_k})

    def kept(self) -> tuple[Path, int] | None:
        """Where predictions are kept, and how many best tokens."""
        from validation.kept.predictions import TOP_K

        return None if self.save_reference is None else (self.save_reference, self.top_k or TOP_K)

    @property
    def compares(self) -> bool:
        """Whether no reference is run: what is judged is held against another graph, or kept predictions."""
        return self.against is not None and self.against.path is not None

    @property
    def asks_transformers(self) -> bool:
        """Whether the reference itself is held against Hugging Face's own Llama."""
        return self.against is not None and self.against.kind == TRANSFORMERS

    def manner(self) -> Manner:
        """How stages are run and looked at."""
        from validation.manner import Manner

        return Manner(self.streamed, self.bisect, self.edges)


def validate(artifact: Path, options: ValidateOptions, *, force: bool = True, progress: Progress = silent) -> Outcome:
    """Compare every stage with the reference and write reports/parity.*; by default always anew, because a proof is of now."""
    _check_besides(options)
    manifest = require_artifact(artifact, "validate", weights=True)
    model = manifest["model"]
    _check_texts(options.texts)
    _check_bisect(options)
    baseline = _open_baseline(options.baseline, model)
    recorded = {
        "stages": list(options.stages),
        "text": [sha256_of(text) for text in options.texts],
        "tokens": options.tokens,
        "checkpoint": manifest["steps"].get("export", {}).get("options"),
        "device": options.device,
        "baseline": None if baseline is None else baseline.sha256,
        "streamed": options.streamed,
        **{name: True for name in ("bisect", "edges") if getattr(options, name)},
        **options.recorded_besides(),
    }

    def work(step: StepContext) -> Report:
        from engines.device import find_device
        from validation.besides import Besides
        from validation.parity import validate_artifact

        check_memory(_cost(LlamaConfig(**model["config"]), options, artifact), artifact)
        checkpoint = _reopen(options.checkpoint, model, progress)
        stages = list(options.stages) or None
        asked: dict[str, Any] = {
            "text": options.texts or None,
            "tokens": options.tokens,
            "manner": options.manner(),
        }
        device = find_device() if options.device == "cuda" else None
        asked["besides"] = Besides(baseline, _transformers(options, checkpoint), options.kept())
        return validate_artifact(step, checkpoint=checkpoint, stages=stages, device=device, **asked)

    return run_step(artifact, "validate", recorded, work, force=force, progress=progress)


def validate_file(graph: Path, options: ValidateOptions, *, out: Path | None = None, progress: Progress = silent) -> Report:
    """Compare any decoder's ONNX file with the checkpoint that it was exported from; no artifact is needed."""
    of_artifacts = (options.stages, options.device != "cpu", options.streamed, options.bisect, options.edges)
    if options.checkpoint is None or any(of_artifacts):
        raise UsageError(
            "--graph FILE is checked against a checkpoint on the CPU, loaded whole, is its only stage, and has no node to narrow to nor profiles",
            hint="--graph FILE --checkpoint SRC, without --stage, --device, --streamed, --bisect and --edges",
        )
    _check_besides(options)
    _check_texts(options.texts)
    from validation.besides import Besides
    from validation.lone.report import validate_graph

    checkpoint = open_request(CheckpointRequest(options.checkpoint), progress=progress)
    baseline = _open_baseline(options.baseline, {"fingerprint": checkpoint.fingerprint})
    besides = Besides(baseline, _transformers(options, checkpoint), options.kept())
    return validate_graph(graph, checkpoint, out=out, text=options.texts or None, tokens=options.tokens, besides=besides, progress=progress)


def _cost(config: LlamaConfig, options: ValidateOptions, artifact: Path) -> StepCost:
    """What is asked for, looked at closer or not; with the products of a decode that multiplies by a vector, which a CPU holds whole."""
    from validation.residency import choose_residency

    closer = closer_memory(config, edges=options.edges) if options.bisect or options.edges else 0
    cost = validate_cost(config, whole=not choose_residency(config, options.streamed).streamed, closer=closer)
    gemv = any(has_gemv(graph.stem) for graph in artifact.glob("*.onnx"))
    return replace(cost, memory_bytes=cost.memory_bytes + products_bytes(config)) if gemv else cost


def _check_besides(options: ValidateOptions) -> None:
    """Refuse options without the one that they belong to, a file that could not be read back by its name, and transformers where it is not there."""
    if options.max_kl is not None and not options.compares:
        raise UsageError("--max-kl is a limit of a comparison with another graph", hint="--against ART|FILE.onnx")
    if options.top_k is not None and options.save_reference is None:
        raise UsageError("--top-k says how much --save-reference keeps", hint="--save-reference FILE.safetensors")
    if options.save_reference is not None and options.save_reference.suffix != ".safetensors":
        raise UsageError(f"--save-reference {options.save_reference}: the file must end in .safetensors, by which --against knows it")
    if options.asks_transformers:
        from validation.transformers_model import require_transformers

        require_transformers()


def _transformers(options: ValidateOptions, checkpoint: Checkpoint) -> TransformersModel | None:
    """Hugging Face's own Llama of a checkpoint where it was asked for; what it refuses is known before anything is measured."""
    if not options.asks_transformers:
        return None
    from validation.transformers_model import TransformersModel

    return TransformersModel(checkpoint)


def _open_baseline(path: Path | None, model: Report) -> Baseline | None:
    """The older report, read and held against what is known of the model before anything is measured."""
    if path is None:
        return None
    from validation.baseline_file import read_baseline

    baseline = read_baseline(path)
    baseline.require_comparable({"model": model})
    return baseline


def _check_bisect(options: ValidateOptions) -> None:
    """Refuse to look closer at engine graphs alone: they are held against their stages, whose layers are looked at."""
    asked = next((f"--{name}" for name in ("bisect", "edges") if getattr(options, name)), None)
    if asked and options.stages and all(map(is_engine, options.stages)):
        named = ", ".join(options.stages)
        hint = f"--stage {stage_of(options.stages[0])} {asked}"
        raise UsageError(f"{asked} looks at a stage's layers; {named} is held against its stage as a whole, and not looked at", hint=hint)


def _check_texts(texts: tuple[Path, ...]) -> None:
    for text in texts:
        if not text.is_file():
            raise ValidationError(f"{text} is not a file", hint="--text FILE takes a UTF-8 text")


def _reopen(moved_to: str | None, model: Report, progress: Progress) -> Checkpoint:
    """The checkpoint that the artifact was made from; the reference must not come from the artifact it judges."""
    request = CheckpointRequest.from_record(model.get("request", {"source": model["source"]}))
    if moved_to not in (None, request.source):
        request = replace(request, source=moved_to, revision=None)  # the revision is of where it was
    try:
        checkpoint = open_request(request, progress=progress)
    except CheckpointError as error:
        raise ValidationError(f"the checkpoint of this artifact can't be opened: {error}", hint="--checkpoint SRC says where it is now") from error
    if checkpoint.fingerprint != model["fingerprint"]:
        raise ValidationError(
            f"{checkpoint.source} is not the checkpoint that this artifact was made from ({model['name']})", hint="--checkpoint SRC says where it is"
        )
    return checkpoint
