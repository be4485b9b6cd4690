"""estimate: what every step will take here, whether the engine fits its GPU, and how fast it can be; nothing is started or downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifact.calibration import calibration_step
from artifact.config import LlamaConfig
from artifact.engine_names import engine_folder
from artifact.errors import CheckpointError, UsageError
from artifact.hub_folder import cache_folder
from artifact.io_spec import KvCache
from artifact.layout import parameter_count
from artifact.manifest import MANIFEST, kv_cache_of, read_manifest
from artifact.presets import PRESETS, preset
from artifact.room import existing_folder, free_disk, free_memory
from artifact.stale import stale_steps
from commands.build import check_precision
from commands.machine_rates import measure_rates
from engines.build import STAGES
from engines.device_fit import load_of
from engines.estimate import Machine, Question, estimate
from engines.form_limits import QUANTIZED_TYPES
from engines.profiles import DEFAULT_BATCH
from engines.targets import find_target

if TYPE_CHECKING:
    from exporter.checkpoints.request import CheckpointRequest

Report = dict[str, Any]
DOWNLOADED_BYTES_A_PARAMETER = 2
"""Published models are float16 or bfloat16."""


@dataclass(frozen=True)
class EstimateOptions:
    """What an engine is asked for; as ``BuildOptions``, with the form of the cache that an export would choose; None: an artifact's, or dynamic."""

    precision: str = "fp16"
    target: str = "a100-80gb"
    kv_cache: KvCache | None = None
    max_batch: int = DEFAULT_BATCH
    max_length: int | None = None
    capacity: int | None = None
    max_memory: int | None = None
    calibrated: bool = True


@dataclass(frozen=True)
class Model:
    """The shape that is asked about, what it is called, and what a download would take.

    Attributes:
        kv_cache, dtype, in_place: of an artifact: form and number type that it has, and whether its graphs point into the checkpoint's own files.
        artifact: its folder.
        random: made up; nothing is calibrated on it.
    """

    name: str
    config: LlamaConfig
    kv_cache: KvCache | None = None
    random: bool = False
    download_bytes: int = 0
    dtype: str | None = None
    in_place: bool = False
    artifact: Path | None = None

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
    target, model = find_target(options.target), find_model(request)
    _check_artifact(model, options)
    folder, form = out or model.artifact or Path("artifacts"), model.kv_cache or options.kv_cache or "dynamic"
    load = load_of(model.config, options.precision, form, max_batch=options.max_batch, max_length=options.max_length, capacity=options.capacity)
    packed, calibrated = model.is_packed(options.precision), options.calibrated and not model.random
    question = Question(model.config, load, target, calibrated, options.max_memory, packed, model.download_bytes, steps_done(model, options))
    machine = Machine(free_memory(), free_disk(folder), measure_rates(folder), cache_disk(folder))
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
        return _of_artifact(Path(source), described)
    if request.is_random and request.size is not None:
        return Model(f"{request.size}, random weights", preset(request.size), random=True)
    _refuse_absent(request)
    from exporter.checkpoints import open_request

    checkpoint = open_request(request)
    return Model(checkpoint.name, checkpoint.config, random=request.is_random)


def _of_artifact(artifact: Path, described: Mapping[str, Any]) -> Model:
    """What a manifest says of its model."""
    return Model(
        described["name"],
        LlamaConfig(**described["config"]),
        kv_cache_of(described),
        random=str(described["format"]).startswith("random"),
        dtype=described["dtype"],
        in_place=described.get("weights") == "reference",
        artifact=artifact,
    )


def steps_done(model: Model, options: EstimateOptions) -> frozenset[str]:
    """The steps that an artifact has behind it, up to the first whose files are stale or not there; validating is a step to come."""
    if model.artifact is None:
        return frozenset()
    artifact, manifest, precision = model.artifact, read_manifest(model.artifact), options.precision
    stale, asked = stale_steps(artifact, manifest), {"max_batch": options.max_batch, "max_length": options.max_length, "capacity": options.capacity}
    build = engine_folder(find_target(options.target).name, precision).replace("engines/", "build-")
    chain = {"export": "export"} | ({"fuse": "fuse"} if precision != "fp32" else {})
    chain |= {f"quantize-{precision}": "quantize"} if precision in QUANTIZED_TYPES else {}

    def is_done(step_id: str) -> bool:
        step = manifest["steps"].get(step_id)
        same = step is not None and (step_id != build or asked.items() <= step["options"].items())
        return (
            step is not None
            and same
            and step_id not in stale
            and "spent" not in step
            and all((artifact / file).is_file() for file in step["outputs"])
        )

    weightless = manifest["model"].get("weights") == "none"
    done = {name for _, name in takewhile(lambda step: not weightless and is_done(step[0]), (chain | {build: "build"}).items())}
    calibrated = "quantize" in done or is_done(calibration_step(precision))
    return frozenset(done | ({"calibrate"} if calibrated else set()))


def cache_disk(folder: Path) -> int | None:
    """Bytes free where the hub's cache lies; None where that is the artifact's own disk."""
    there, here = existing_folder(cache_folder()), existing_folder(folder)
    return None if there.stat().st_dev == here.stat().st_dev else free_disk(there)


def _check_artifact(model: Model, options: EstimateOptions) -> None:
    """Refuse what an artifact is not."""
    if model.artifact is None:
        return
    check_precision(str(model.dtype), options.precision)
    if options.kv_cache not in (None, model.kv_cache):
        raise UsageError(
            f"{model.artifact} was exported with a {model.kv_cache} cache; --kv-cache {options.kv_cache} is another",
            hint=f"leave --kv-cache out, or export again with --kv-cache {options.kv_cache}",
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
    from artifact.user_cache import cache_folder as own_cache
    from exporter.checkpoints import DEMO
    from exporter.checkpoints.demo import GGUF
    from exporter.checkpoints.hub_cache import find_snapshot

    repository = request.repository()
    if repository is not None:
        cached = find_snapshot(repository, request.revision)
        if cached is None or cached.missing:
            raise CheckpointError(f"{repository} is not in the local cache, and an estimate downloads nothing", hint="--size SIZE, or a folder")
    if request.source == DEMO and not (own_cache() / GGUF).is_file():
        raise CheckpointError("the demo model is not in the local cache, and an estimate downloads nothing", hint="cli.py export --checkpoint demo")
