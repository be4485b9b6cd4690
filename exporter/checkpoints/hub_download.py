"""Download a model from the Hugging Face hub into its cache; the one place that talks to the hub.

One file at a time (the hub's transfer is parallel within a file), so that an interrupt ends at once; files that are whole stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.utils.tqdm import tqdm

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.hub_folder import cache_folder
from artifact.progress import Progress
from exporter.checkpoints.hub_cache import DEFAULT_REVISION, Snapshot, model_folder, remember
from exporter.checkpoints.hub_files import choose_files
from exporter.checkpoints.huggingface import read_config
from exporter.checkpoints.json_file import CONFIG

MIB = 1 << 20
CheckConfig = Callable[[LlamaConfig], None]
"""Raises where the config is not the one that was asked for."""


@dataclass(frozen=True)
class Listing:
    """What the hub says of a model at one commit: the name of every file → its size in bytes."""

    repository: str
    commit: str
    sizes: dict[str, int]

    @property
    def label(self) -> str:
        """For messages: name and short commit."""
        return f"{self.repository}@{self.commit[:7]}"


def list_files(repository: str, revision: str | None) -> Listing:
    """Ask the hub what a model holds; two kilobytes, nothing of the model itself."""
    info = HfApi(endpoint=constants.ENDPOINT).model_info(repository, revision=revision, files_metadata=True)
    if info.sha is None:
        raise CheckpointError(f"{repository}: {constants.ENDPOINT} names no commit", hint="check HF_ENDPOINT")
    return Listing(repository, info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()})


def download(repository: str, revision: str | None, progress: Progress, check: CheckConfig) -> Snapshot:
    """Fetch what is read of a model and is not in the cache; what can be wrong is found before the big files.

    Raises:
        CheckpointError: a config that is not supported or fails ``check``, no readable weights, no space. The hub's own errors pass through.
    """
    progress(f"asking the hub for {repository}", 0, 1)
    listing = list_files(repository, revision)
    wanted = choose_files(listing.sizes, partial(_fetch, listing), listing.label)
    folder = model_folder(repository) / "snapshots" / listing.commit
    for name in wanted.small:
        _fetch(listing, name)
    if CONFIG in wanted.small:
        check(LlamaConfig.from_hf(read_config(folder)))
    left = [name for name in wanted.weights if not (folder / name).is_file()]
    total = sum(listing.sizes[name] for name in left)
    check_space(total, listing.label)
    told = _Told(progress, f"downloading {listing.label}: {_megabytes(total)} in {len(left)} files, MiB", total) if left else None
    for name in left:
        _fetch(listing, name, told)
    remember(repository, revision or DEFAULT_REVISION, listing.commit)
    return Snapshot(folder, tuple(name for name in wanted.weights if not (folder / name).is_file()))


def check_space(needed: int, label: str) -> None:
    """Refuse a download that the disk of the cache can't hold.

    Raises:
        CheckpointError: with both numbers.
    """
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{label} needs {_megabytes(needed)} in {folder}, and {_megabytes(free)} are free there",
            hint="HF_HOME names another folder for the hub's cache",
        )


def _megabytes(size: int) -> str:
    return f"{-(-size // 10**6):,} MB"


class _Told:
    """Bytes of all files, said in MiB."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self.progress, self.what, self.total, self.done = progress, what, total, 0
        self.add(0)

    def add(self, count: int) -> None:
        self.done = min(self.done + count, self.total)  # a transfer that starts over is counted twice
        self.progress(self.what, self.done // MIB, self.total // MIB)


def _fetch(listing: Listing, name: str, told: _Told | None = None) -> Path:
    """One file, from the cache or the hub; the local path."""
    path = hf_hub_download(
        listing.repository,
        name,
        revision=listing.commit,
        cache_dir=cache_folder(),
        endpoint=constants.ENDPOINT,
        tqdm_class=_counting_bar(told),
    )
    return Path(path)


def _counting_bar(told: _Told | None) -> type[Any]:
    """The hub's progress bar as a class that prints nothing, and counts."""

    class CountingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            tqdm.__init__(self, *args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if told is not None:
                told.add(int(n or 0))
            return None

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire, which the hub counts apart; those written are counted above."""

    return CountingBar
