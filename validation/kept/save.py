"""``validate --save-reference``: what the reference predicts on the tokens of a validation, for machines that have no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from artifact.manifest import atomic_write
from exporter.checkpoints import Checkpoint
from validation.kept.file import Kept, describe_kept, to_bytes
from validation.kept.predictions import DRAWN, SEED, Array, Predictions, keep
from validation.oracle import Oracle


def save_reference(path: Path, oracle: Oracle, checkpoint: Checkpoint, top_k: int) -> dict[str, Any]:
    """Write a file.

    Args:
        path: where; its folder is there.
        oracle: the reference's runs; logits are made one window at a time.
        checkpoint: whose they are.
        top_k: best tokens that are kept of each position; fewer where the vocabulary is smaller.

    Returns:
        file, sha256, positions, bytes_per_position, top_k, drawn and rest_mass.
    """
    random = np.random.default_rng(SEED)
    sequences = [keep(logits, top_k, DRAWN, random) for logits in oracle.logits]
    windows, targets = list[Predictions](), [np.zeros(0, np.float32)]
    for index, logits in _windows(oracle):
        windows.append(keep(logits, top_k, DRAWN, random))
        targets.append(np.take_along_axis(logits, oracle.windows[index].targets[:, None], axis=-1)[:, 0])
    model = {"name": checkpoint.name, "source": checkpoint.source, "format": checkpoint.format, "fingerprint": checkpoint.fingerprint}
    texts = [{"name": text.name, "sha256": text.sha256, "kind": text.kind, "bos": text.bos} for text in oracle.texts]
    ids = [_longest(oracle, sequence) for sequence in range(len(sequences))]
    kept = Kept(model, checkpoint.config, texts, ids, oracle.windows, sequences, windows, np.concatenate(targets))
    with atomic_write(path) as temporary:
        temporary.write_bytes(to_bytes(kept))
    return describe_kept(path, kept)


def _windows(oracle: Oracle) -> Iterator[tuple[int, Array]]:
    return ((index, oracle.window_logits(index)) for index in range(len(oracle.windows)))


def _longest(oracle: Oracle, sequence: int) -> Array:
    """A sequence's token ids: the longest of the rows that are prefixes of it."""
    rows = [row for scenario in oracle.scenarios for row, of in zip(scenario.rows, scenario.sequences, strict=True) if of == sequence]
    return max(rows, key=len)
