"""build: ONNX → TensorRT plans, with their audit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from artifact.config import LlamaConfig
from artifact.engine_names import Bucket, engine_folder
from artifact.errors import EngineError
from artifact.manifest import kv_cache_of, require_artifact
from artifact.progress import Progress, silent
from artifact.steps import Outcome, Report, StepContext, require, run_step, why_to_do
from commands.part_graphs import write_part_graphs
from engines.backends.flags import BuildFlags
from engines.build import STAGES, build_engine
from engines.cache_form import longest
from engines.decode_gemv import check_gemv
from engines.engine_options import EngineOptions
from engines.profiles import DEFAULT_BATCH
from engines.targets import find_target
from engines.weight_sizes import float_dtype

WEIGHTS = ("weights/layer-*.safetensors", "weights/shared.safetensors", "weights/rotary.safetensors", "weights/checksums.json")
"""What every stage's graph points into."""


@dataclass(frozen=True)
class BuildOptions:
    """What decides a plan, and what building may take.

    Attributes:
        max_length: None means the model's, at most 4096.
        capacity: its counterpart for a static cache.
        flags: the compiler's own options.
        buckets: several capacities of a static cache, an engine for each (``buckets.build_all``).
        parts: plans that the model is cut into; None means as few as fit.
        max_memory: bytes of the host; None means what is free. It decides no byte of a plan.
    """

    target: str = "a100-80gb"
    backend: str = "auto"
    max_batch: int = DEFAULT_BATCH
    max_length: int | None = None
    capacity: int | None = None
    flags: BuildFlags = field(default_factory=BuildFlags)
    buckets: tuple[Bucket, ...] = ()
    max_memory: int | None = None
    parts: int | None = None

    def folder(self, precision: str) -> str:
        """Where an engine of these options goes, in the artifact."""
        return engine_folder(find_target(self.target).name, precision, self.capacity)


def build(artifact: Path, precision: str, options: BuildOptions, *, force: bool = False, progress: Progress = silent) -> Outcome:
    """Build and audit the engine of one precision."""
    model = require_artifact(artifact, "build", weights=True)["model"]
    check_precision(model["dtype"], precision)
    if options.flags.decode_gemv:
        check_gemv(precision, options.parts, packed=model.get("weights") != "reference")
    longest(kv_cache_of(model), LlamaConfig(**model["config"]), options.max_length, options.capacity)
    require(artifact, f"{STAGES[precision]}.onnx")
    planned = _plan_step(precision, options)

    def work(step: StepContext) -> Report:
        chosen = EngineOptions(**planned.chosen, flags=options.flags, max_memory=options.max_memory)
        report: Report = build_engine(step, chosen, write_part_graphs)
        return report

    return run_step(artifact, planned.step_id, planned.recorded, work, inputs=planned.inputs, force=force, progress=progress)


def why_to_build(artifact: Path, precision: str, options: BuildOptions) -> str:
    """Why ``build`` would build now; empty where the engine is up to date."""
    planned = _plan_step(precision, options)
    return why_to_do(artifact, planned.step_id, planned.recorded, planned.inputs)


@dataclass(frozen=True)
class _Planned:
    """A build as a step.

    Attributes:
        chosen: fields of ``EngineOptions``.
        recorded: as the command line takes them.
        inputs: patterns of what it reads.
    """

    step_id: str
    chosen: dict[str, Any]
    recorded: dict[str, Any]
    inputs: tuple[str, ...]


def _plan_step(precision: str, options: BuildOptions) -> _Planned:
    target = find_target(options.target).name
    flags = options.flags if precision == "fp16" else replace(options.flags, decode_gemv=None)  # a form that no other precision has
    chosen: dict[str, Any] = {
        "precision": precision,
        "target": target,
        "backend": options.backend,
        "max_batch": options.max_batch,
        "max_length": options.max_length,
        "capacity": options.capacity,
        "parts": options.parts,
    }
    # another scheme's weights are none of this engine's business
    inputs = (f"{STAGES[precision]}.onnx", *WEIGHTS, f"weights/{precision}-layer-*.safetensors")
    capacity = f"{options.capacity}," if isinstance(options.capacity, Bucket) else options.capacity  # as it is asked for
    step_id = options.folder(precision).replace("engines/", "build-")
    return _Planned(step_id, chosen, {**chosen, "capacity": capacity, **flags.recorded()}, inputs)


def check_precision(dtype: str, precision: str) -> None:
    """Refuse a precision that an artifact of this dtype can't give.

    Raises:
        EngineError: fp32 engines need an fp32 artifact, all others an fp16 one.
    """
    if precision not in STAGES:
        raise EngineError(f"no precision {precision!r}; there is: {', '.join(STAGES)}")
    if (needed := float_dtype(precision)) != dtype:
        raise EngineError(
            f"a {precision} engine needs an {needed} artifact; this one is {dtype}", hint=f"export into another folder with --dtype {needed}"
        )
