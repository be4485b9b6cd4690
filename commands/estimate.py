"""estimate: what every step will take here, whether the engine fits its GPU, and how fast it can be; nothing is started or downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError, UsageError
from artifact.io_spec import KvCache
from artifact.layout import parameter_count
from artifact.manifest import MANIFEST, kv_cache_of, read_manifest
from artifact.presets import PRESETS, preset
from artifact.room import free_disk, free_memory
from commands.machine_rates import measure_rates
from engines.build import STAGES
from engines.device_fit import load_of
from engines.estimate import Machine, Question, estimate
from engines.targets import find_target

if TYPE_CHECKING:
    from exporter.checkpoints.request import CheckpointRequest

Report = dict[str, Any]
DOWNLOADED_BYTES_A_PARAMETER = 2
"""Published models are float16 or bfloat16."""


@dataclass(frozen=True)
class EstimateOptions:
    """What an engine is asked for; as ``BuildOptions``, with the form of the cache that an export would choose."""

    precision: str = "fp16"
    target: str = "a100-80gb"
    kv_cache: KvCache = "dynamic"
    max_batch: int = 4
    max_length: int | None = None
    capacity: int | None = None
    max_memory: int | None = None
    calibrated: bool = True


@dataclass(frozen=True)
class Model:
    """The shape that is asked about, what it is called, and what a download would take.

    Attributes:
        kv_cache, dtype, in_place: of an artifact: form and number type that it has, and whether its graphs point into the checkpoint's own files.
        random: made up; nothing is calibrated on it.
    """

    name: str
    config: LlamaConfig
    kv_cache: KvCache | None = None
    random: bool = False
    download_bytes: int = 0
    dtype: str | None = None
    in_place: bool = False

    def is_packed(self, precision: str) -> bool:
        """Whether an engine's graph has q·k·v and gate·up as one linear each: not the trace, nor over the checkpoint's files."""
        return precision != "fp32" and not self.in_place


def estimate_command(request: CheckpointRequest, options: EstimateOptions, *, out: Path | None = None) -> Report:
    """Estimate every step for a model, a precision and a GPU.

    Args:
        request: a size, a checkpoint, or an artifact folder as its source.
        options: of the engine.
        out: where the artifact would go; default `artifacts/`.

    Returns:
        ``model``, ``download_bytes``, and ``engines.estimate.estimate``'s report.

    Raises:
        UsageError: neither a size nor a checkpoint.
        CheckpointError: a checkpoint that is not here; nothing is fetched for an estimate.
        EngineError: no such target or precision, or a bound of the other cache form.
    """
    if options.precision not in STAGES:
        raise UsageError(f"no precision {options.precision!r}; there is: {', '.join(STAGES)}")
    target, model, folder = find_target(options.target), find_model(request), out or Path("artifacts")
    form = model.kv_cache or options.kv_cache
    load = load_of(model.config, options.precision, form, max_batch=options.max_batch, max_length=options.max_length, capacity=options.capacity)
    packed, calibrated = model.is_packed(options.precision), options.calibrated and not model.random
    question = Question(model.config, load, target, calibrated, options.max_memory, packed)
    machine = Machine(free_memory(), free_disk(folder), measure_rates(folder))
    return {"model": model.name, "download_bytes": model.download_bytes} | estimate(question, machine)


def find_model(request: CheckpointRequest) -> Model:
    """The shape that a request means, without fetching anything."""
    request.check()
    source = request.source
    if source is None:
        if request.size is None:
            raise UsageError("no model was given", hint=f"--size {' | '.join(PRESETS)}, or --checkpoint SRC")
        return _published(request)
    if (Path(source) / MANIFEST).is_file() and (described := read_manifest(Path(source))["model"]):
        return _of_artifact(described)
    if request.is_random and request.size is not None:
        return Model(f"{request.size}, random weights", preset(request.size), random=True)
    _refuse_absent(request)
    from exporter.checkpoints import open_request

    checkpoint = open_request(request)
    return Model(checkpoint.name, checkpoint.config, random=request.is_random)


def _of_artifact(described: Mapping[str, Any]) -> Model:
    """What a manifest says of its model."""
    return Model(
        described["name"],
        LlamaConfig(**described["config"]),
        kv_cache_of(described),
        random=str(described["format"]).startswith("random"),
        dtype=described["dtype"],
        in_place=described.get("weights") == "reference",
    )


def _published(request: CheckpointRequest) -> Model:
    """A size: its shape is known; whether its weights are here is looked up."""
    from exporter.checkpoints.hub_cache import find_snapshot

    size = str(request.size)
    config, repository = preset(size), PRESETS[size].repository
    cached = find_snapshot(repository, request.revision) if repository else None
    absent = repository is not None and (cached is None or bool(cached.missing))
    return Model(repository or size, config, download_bytes=absent * DOWNLOADED_BYTES_A_PARAMETER * parameter_count(config))


def _refuse_absent(request: CheckpointRequest) -> None:
    """A model that would have to be fetched."""
    from artifact.user_cache import cache_folder
    from exporter.checkpoints import DEMO
    from exporter.checkpoints.demo import GGUF
    from exporter.checkpoints.hub_cache import find_snapshot

    repository = request.repository()
    if repository is not None:
        cached = find_snapshot(repository, request.revision)
        if cached is None or cached.missing:
            raise CheckpointError(f"{repository} is not in the local cache, and an estimate downloads nothing", hint="--size SIZE, or a folder")
    if request.source == DEMO and not (cache_folder() / GGUF).is_file():
        raise CheckpointError("the demo model is not in the local cache, and an estimate downloads nothing", hint="cli.py export --checkpoint demo")
