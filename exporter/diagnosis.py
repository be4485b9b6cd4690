"""What a stored weight is instead of the checkpoint's: zeros, another weight, the right rows in another order, or how far off."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from artifact.census import GraphWeight
from exporter.blocks import joined_rows
from exporter.checkpoints import Checkpoint
from exporter.stored_rows import read_rows

NEARLY_ONE = 0.9999
"""From here on four digits show no difference."""


def describe(artifact: Path, weight: GraphWeight, checkpoint: Checkpoint, parts: tuple[str, ...]) -> str:
    """One reason, in words; reads the weight and the checkpoint again, in blocks of rows."""
    if parts[0] not in checkpoint.shapes:
        return "is not the table that the config gives"
    source = stored = product = largest = 0.0
    differing = size = 0
    rows, expected, found = 0, Counter[bytes](), Counter[bytes]()
    for block in joined_rows(checkpoint, parts):
        ours = read_rows(artifact, weight, rows, rows + block.shape[0])
        theirs = block.to(torch.float32).numpy().astype(ours.dtype)
        rows += block.shape[0]
        expected.update(_digests(theirs))
        found.update(_digests(ours))
        a, b = theirs.astype(np.float64).ravel(), ours.astype(np.float64).ravel()
        differing, size = differing + int(np.count_nonzero(a != b)), size + a.size
        largest = max(largest, float(np.abs(a - b).max()))
        source, stored, product = source + float(a @ a), stored + float(b @ b), product + float(a @ b)
    if stored == 0:
        return "is all zeros"
    if found == expected:
        return "holds the checkpoint's rows in another order (rotary pairs left interleaved?)"
    if (other := _other(artifact, weight, checkpoint)) is not None:
        return f"holds {other}"
    return f"differs from the checkpoint: {_distance(source, stored, product)}, {differing:,} of {size:,} values, the largest by {largest:.3g}"


def _distance(source: float, stored: float, product: float) -> str:
    """Correlation and norm; where both are 1 to four digits, what is left of it."""
    if not source:
        return "correlation 0, norm × inf"
    correlation, norm = product / (source * stored) ** 0.5, (stored / source) ** 0.5
    near = f"1 − {max(0.0, 1 - correlation):.1e}" if correlation > NEARLY_ONE else f"{correlation:.4f}"
    return f"correlation {near}, norm × {f'(1 {norm - 1:+.1e})' if abs(norm - 1) < 1 - NEARLY_ONE else f'{norm:.4g}'}"


def _digests(rows: np.ndarray[tuple[int, ...], np.dtype[np.floating]]) -> list[bytes]:
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in np.atleast_1d(rows)]


def _other(artifact: Path, weight: GraphWeight, checkpoint: Checkpoint) -> str | None:
    """The weight of the checkpoint whose first row this one has."""
    first = read_rows(artifact, weight, 0, 1)
    for name, shape in checkpoint.shapes.items():
        if shape[1:] == weight.shape[1:] and name != weight.name:
            row = checkpoint.read_rows(name, 0, 1).to(torch.float32).numpy().astype(first.dtype)
            if len(shape) > 1 and np.array_equal(row, first):
                return name
    return None
