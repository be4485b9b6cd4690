"""A published model: found in the local cache of the Hugging Face hub, or fetched into it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from artifact.errors import CheckpointError, UsageError
from artifact.progress import Progress
from exporter.checkpoints.hub_cache import Snapshot, find_snapshot

if TYPE_CHECKING:
    from exporter.checkpoints.hub_download import CheckConfig, Listing


def fetch_snapshot(repository: str, revision: str | None, progress: Progress, check: CheckConfig) -> Snapshot:
    """A complete snapshot of a model: from the local cache, without a word to the network, or else from the hub.

    Only what is read is fetched: config, tokenizer, and the weights in one form.

    Args:
        repository: ``ORG/NAME``.
        revision: branch, tag or commit; None is the default branch, as the cache knows it where it holds it whole.
        progress: told how much is fetched before it is, and how far it is, in MiB.
        check: called with the config before the weights are fetched.

    Raises:
        CheckpointError: no network, no access, no such model or revision, no space, or a model that can't be read.
        UsageError: a revision that is no name of one.
    """
    cached = find_snapshot(repository, revision)
    if cached is not None and not cached.missing:
        return cached
    _require_client(repository)
    from exporter.checkpoints.hub_download import download
    from exporter.checkpoints.hub_errors import explain

    try:
        return download(repository, revision, progress, check)
    except (CheckpointError, UsageError):
        raise
    except Exception as error:
        explained = explain(error, repository, revision)
        if explained is None:
            raise
        if cached is not None:
            explained = CheckpointError(f"{explained}; the cached copy lacks {', '.join(cached.missing[:3])}", hint=explained.hint)
        raise explained from error


def published_files(repository: str, revision: str | None) -> Listing:
    """What the hub says a model holds; nothing is downloaded.

    Raises:
        CheckpointError: as ``fetch_snapshot``.
    """
    _require_client(repository)
    from exporter.checkpoints.hub_download import list_files
    from exporter.checkpoints.hub_errors import explain

    try:
        return list_files(repository, revision)
    except CheckpointError:
        raise
    except Exception as error:
        if (explained := explain(error, repository, revision)) is None:
            raise
        raise explained from error


def _require_client(repository: str) -> None:
    if find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{repository} is neither a folder here nor in the hub's local cache, and huggingface_hub is not installed to fetch it",
            hint="pip install 'llama2trt[hub]', or give a local folder as --checkpoint",
        )
