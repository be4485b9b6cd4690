"""Keep the floor of a checkpoint and a text between the graphs that are judged by it.

Its file is ``floors/<key>-<check>.json`` in the user's cache folder: key is a hash of everything that a floor depends on, check one of the key and of
the file's bytes, so a damaged or renamed file is not what its name says, and is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from artifact.errors import ArtifactError
from artifact.manifest import atomic_write
from artifact.steps import StepContext
from artifact.user_cache import cache_folder
from validation.floor import Floor, compute_floor, floor_key, floor_source
from validation.reference import Reference, ReferenceRun

logger = logging.getLogger(__name__)
KEPT_FILES = 64
"""Floors that stay, the newest: 10 MB at 500 positions each."""


def cached_floor(
    step: StepContext,
    fingerprint: str,
    reference: Reference,
    sequences: Sequence[NDArray[np.int64]],
    runs: Sequence[ReferenceRun],
    rounded: Sequence[ReferenceRun] = (),
) -> Floor:
    """As ``floor.measure_floor``, kept in the user's cache folder; one that can't be read or written costs a measurement, and no more."""
    key = floor_key(fingerprint, sequences, floor_source(reference.config))
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = _folder()
    kept = _read(folder, name) if folder else None
    if kept is not None:
        return kept
    floor = compute_floor(reference, sequences, runs, rounded, step.progress)
    if folder:
        _write(folder, name, floor)
    return floor


def _folder() -> Path | None:
    try:
        return cache_folder() / "floors"
    except RuntimeError as error:  # there is no home folder
        logger.warning("the floor is not kept: %s", error)
        return None


def _read(folder: Path, name: str) -> Floor | None:
    for path in folder.glob(f"{name}-*.json"):
        try:
            content = path.read_bytes()
            if path.name == _file(name, content):
                return Floor(**json.loads(content))
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s is not a kept floor: %s", path, error)
    return None


def _write(folder: Path, name: str, floor: Floor) -> None:
    content = json.dumps(asdict(floor)).encode()
    try:
        with atomic_write(folder / _file(name, content)) as temporary:
            temporary.write_bytes(content)
        for old in sorted(folder.glob("*-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)[KEPT_FILES:]:
            old.unlink(missing_ok=True)
    except (ArtifactError, OSError) as error:
        logger.warning("the floor is not kept: %s", error)


def _file(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(name.encode() + content).hexdigest()[:16]}.json"
