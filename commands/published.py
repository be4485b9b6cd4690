"""inspect, of what is not here yet: a published size, or a model on the hub, described without downloading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifact.layout import parameter_count
from artifact.presets import PRESETS, preset
from artifact.progress import Progress
from engines.estimate import fits_on

Report = dict[str, Any]


def describe_published(name: str, progress: Progress) -> Report | None:
    """What a size or a model on the hub is; None for anything else, and for a model that the local cache holds whole.

    Raises:
        CheckpointError: a model on the hub that can't be asked for.
    """
    from exporter.checkpoints.hub_cache import find_snapshot
    from exporter.checkpoints.request import hub_id

    if name in PRESETS and not Path(name).exists():
        return _size(name)
    repository = hub_id(name)
    if repository is None:
        return None
    cached = find_snapshot(repository, None)
    return None if cached is not None and not cached.missing else _model(repository, progress)


def _size(size: str) -> Report:
    """The published shape, and what of it is in the cache; asks nobody."""
    from exporter.checkpoints.hub_cache import find_snapshot

    repository = PRESETS[size].repository
    cached = find_snapshot(repository, None) if repository else None
    state = "not here" if cached is None else f"incomplete: lacks {', '.join(cached.missing)}" if cached.missing else str(cached.folder)
    config = preset(size)
    return {
        "path": size,
        "kind": "published size",
        "repository": repository or "none: give its weights as --checkpoint",
        "parameters": parameter_count(config),
        "float16_bytes": 2 * parameter_count(config),
        "cached": state,
        "fits": fits_on(config),
        "config": {key: value for key, value in config.to_hf().items() if key != "architectures"},
    }


def _model(repository: str, progress: Progress) -> Report:
    """What the hub lists of a model."""
    from exporter.checkpoints.hub import published_files
    from exporter.checkpoints.hub_files import usual_files

    progress(f"asking the hub for {repository}", 0, 1)
    listing = published_files(repository, None)
    return {
        "path": repository,
        "kind": "model on the hub, not downloaded",
        "revision": listing.commit,
        "bytes": sum(listing.sizes.values()),
        "bytes_that_export_reads": sum(listing.sizes[name] for name in usual_files(listing.sizes)),
        "files": dict(sorted(listing.sizes.items())),
    }
