"""What build.json says of one plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from artifact.config import LlamaConfig
from artifact.io_spec import Dtype, KvCache, part_inputs, part_outputs
from engines.backends.allocator import DISTRIBUTION, SYSTEM
from engines.backends.flags import BuildFlags
from engines.backends.protocol import BuildResult
from engines.backends.tensorrt_rtx import TensorRTRTX
from engines.cache_form import cache_entry
from engines.device_fit import Load
from engines.engine_options import EngineOptions
from engines.estimate import device_report
from engines.part_plan import Layers, PartPlan
from engines.profiles import Profile
from engines.targets import Target


@dataclass(frozen=True)
class EngineModel:
    """What all parts of an engine share.

    Attributes:
        config, dtype, kv_cache: of the model.
        load: rows and length that the profiles admit.
        target: the GPU.
        options: as asked for, the form of decode as it was settled.
        lowering: ``min_tensorrt`` and ``lowered``, as fuse recorded them.
        cut: the layers of each part.
    """

    config: LlamaConfig
    dtype: Dtype
    load: Load
    target: Target
    options: EngineOptions
    lowering: Mapping[str, Any]
    cut: PartPlan

    @property
    def kv_cache(self) -> KvCache:
        """Its form."""
        return self.load.kv_cache

    @property
    def gemv(self) -> bool:
        """Whether decode multiplies by a vector: asked for, or settled."""
        return bool(self.options.flags.decode_gemv)

    @property
    def lowered(self) -> bool:
        """Whether attention is in operators of an older release."""
        return "Attention" in self.lowering["lowered"]


def _part_entry(model: EngineModel, part: int) -> dict[str, Any]:
    """What is known of a part before it is built: ``part``, ``layers``, ``inputs``, ``outputs``."""
    layers = model.cut.layers[part]
    inputs, outputs = (spec(model.config, model.dtype, model.kv_cache, layers) for spec in (part_inputs, part_outputs))
    return {"part": part, "layers": list(layers), "inputs": [value.name for value in inputs], "outputs": [value.name for value in outputs]}


def engine_entry(model: EngineModel, part: int, backend: str, profiles: Sequence[Profile], result: BuildResult) -> dict[str, Any]:
    """All but the files' hashes and the audit.

    Args:
        model: the engine.
        part: which of its plans.
        backend: who built it.
        profiles: of this part.
        result: what building took.
    """
    options, load, dtype = model.options, model.load, model.dtype
    return {
        "precision": options.precision,
        "target": model.target.name,
        "backend": backend,
        **_part_entry(model, part),
        **_cost(result),
        "profiles": {profile.name: dict(profile.axes) for profile in profiles},
        **_compiler(result, model.target, options.flags),
        **model.lowering,
        "max_batch": options.max_batch,
        "max_length": load.length,
        **cache_entry(model.kv_cache, model.config, dtype, load.batch, load.length, result.static_cache),
        "device": device_report(model.config, load, model.target),
        "notes": _notes(model, backend, result),
    }


def parts_of(engines: Sequence[Mapping[str, Any]], reason: str) -> dict[str, Any]:
    """The split, for whoever runs the plans one after the other: ``parts`` [{file, graph, layers, inputs, outputs}], ``parts_reason``."""
    keys = ("file", "graph", "layers", "inputs", "outputs")
    return {"parts": [{key: engine[key] for key in keys} for engine in engines], "parts_reason": reason}


def same_split(entries: Sequence[Mapping[str, Any]]) -> tuple[Layers, ...]:
    """The split that plans of an interrupted build were cut for; empty where there are none."""
    splits = {tuple((int(first), int(last)) for first, last in entry["split"]) for entry in entries if "split" in entry}
    return splits.pop() if len(splits) == 1 else ()


def _notes(model: EngineModel, backend: str, result: BuildResult) -> list[str]:
    """What is otherwise than asked, or than usual."""
    precision, admitted = model.options.precision, model.load.batch
    measured = "TensorRT-RTX would write" if backend == TensorRTRTX.name else f"TensorRT-RTX, which {backend} was not measured against, writes"
    rows = f"the profiles admit {admitted} rows: with 1, {measured} every {precision} weight out at each step"
    release = model.lowering["min_tensorrt"]
    attention = f"attention is in operators of TensorRT {release} (fuse --min-tensorrt), for which the audit has limits of its own"
    gemv = "decode multiplies by a vector, as is faster for small models (--no-decode-gemv turns it off): a prefill has two tokens at least"
    slow = f"built under the system's allocator, which takes half as long again: pip install {DISTRIBUTION}"
    said = {rows: admitted > model.options.max_batch, attention: model.lowered, gemv: model.gemv}
    return [note for note, holds in (said | {slow: result.compiler.get("allocator") == SYSTEM}).items() if holds]


def _compiler(result: BuildResult, gpu: Target, flags: BuildFlags) -> dict[str, Any]:
    """Who built it, for what, and what it was asked for."""
    capability = ".".join(map(str, gpu.compute_capability))
    return {"tensorrt_version": result.version, "compute_capability": capability, "flags": flags.as_record(), **result.compiler}


def _cost(result: BuildResult) -> dict[str, Any]:
    return {
        "build_s": result.seconds,
        "peak_rss_mb": result.peak_rss_mb,
        "peak_anonymous_mb": result.peak_anonymous_mb,
        "network_layers": result.network_layers,
    }
