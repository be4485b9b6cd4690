"""The local cache of the Hugging Face hub: models there are read where they lie, and nothing touches the network.

Its layout: ``models--ORG--NAME/refs/REVISION`` holds the commit that a branch or tag was when it was downloaded;
``models--ORG--NAME/snapshots/COMMIT/…`` are links into ``blobs/``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from artifact.errors import CheckpointError, UsageError
from artifact.hub_folder import cache_folder
from exporter.checkpoints.hub_files import FORMS, META_CONFIG, shard_names
from exporter.checkpoints.json_file import CONFIG
from exporter.checkpoints.meta_config import read_params
from exporter.checkpoints.torch_file import open_torch

COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT_REVISION = "main"
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True)
class Snapshot:
    """One commit of a model in the cache.

    Attributes:
        folder: of the commit.
        missing: files that are needed and not there; none in a complete snapshot.
    """

    folder: Path
    missing: tuple[str, ...]

    @property
    def commit(self) -> str:
        """The 40 hex digits."""
        return self.folder.name


def model_folder(repository: str) -> Path:
    """Where the cache keeps a model, whether it is there or not."""
    return cache_folder() / f"models--{repository.replace('/', '--')}"


def find_snapshot(repository: str, revision: str | None) -> Snapshot | None:
    """The snapshot that a revision was when it was last downloaded; None where there is none.

    Raises:
        UsageError: a revision that is no name of one.
        CheckpointError: the snapshot holds an index that can't be read.
    """
    folder = model_folder(repository)
    commit = resolve_cached(folder, DEFAULT_REVISION if revision is None else revision)
    snapshot = folder / "snapshots" / commit if commit else None
    return Snapshot(snapshot, missing_files(snapshot)) if snapshot is not None and snapshot.is_dir() else None


def resolve_cached(folder: Path, revision: str) -> str | None:
    """The commit of a branch, tag or commit, as the cache knows it; a name that leaves the folder is refused."""
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UsageError(f"--revision {revision!r} is not a branch, tag or commit")
    if COMMIT.fullmatch(revision):
        return revision
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="ascii", errors="replace").strip() if reference.is_file() else ""
    return commit if COMMIT.fullmatch(commit) else None


def remember(repository: str, revision: str, commit: str) -> None:
    """Record which commit a branch or tag is, once all of its files are there."""
    if COMMIT.fullmatch(revision):
        return
    reference = model_folder(repository) / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    temporary = reference.with_name(f".{reference.name}.{os.getpid()}")
    temporary.write_text(commit, encoding="ascii")
    temporary.replace(reference)


def missing_files(snapshot: Path) -> tuple[str, ...]:
    """Files that a snapshot needs and lacks: its config, and the weights in one form."""
    parts = sorted(snapshot.glob("consolidated.*.pth"))
    if (snapshot / META_CONFIG).is_file() and parts:
        names = (f"consolidated.{number:02d}.pth" for number in range(_count_parts(parts[0])))
        return tuple(name for name in names if not (snapshot / name).is_file())
    missing = () if (snapshot / CONFIG).is_file() else (CONFIG,)
    for _, single, index in FORMS:
        if (snapshot / single).is_file():
            return missing
        if (snapshot / index).is_file():
            return (*missing, *(name for name in shard_names(snapshot / index) if not (snapshot / name).is_file()))
    return (*missing, FORMS[0][1])


def _count_parts(part: Path) -> int:
    """How many model-parallel parts there must be: one holds 1/n of the columns of wo. 0 where it doesn't say; the reader names why."""
    try:
        dim, output = read_params(part.parent)["dim"], open_torch(part).tensors.get("layers.0.attention.wo.weight")
    except CheckpointError:
        return 0
    return dim // output.shape[1] if output is not None and len(output.shape) == 2 and output.shape[1] else 0
