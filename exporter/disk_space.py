"""Is there room for the weights? Found out before the first byte."""

from __future__ import annotations

import shutil

from artifact.errors import ExportError
from artifact.steps import StepContext

MARGIN_BYTES = 64 << 20
"""For graphs, tokenizer and manifest."""


def check_space(step: StepContext, sizes: dict[str, int]) -> None:
    """Compare what the files will need at the worst moment with what is free; each is written beside the one it replaces.

    Args:
        step: the artifact; files that an interrupted run has finished are there already.
        sizes: file → bytes, in the order they are written.

    Raises:
        ExportError: the disk is too small.
    """
    finished = step.journal.files if step.journal is not None else {}
    used = needed = 0
    for file, size in sizes.items():
        if file not in finished:
            path = step.artifact / file
            needed = max(needed, used + size)
            used += size - (path.stat().st_size if path.is_file() else 0)
    needed, free = needed + MARGIN_BYTES, shutil.disk_usage(step.artifact).free
    if needed > free:
        raise ExportError(
            f"{step.artifact}: the export needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free on this disk",
            hint="free some space, choose another --out, or look at the graph alone with --weights none",
        )
