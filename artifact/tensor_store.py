"""Tensors of a step into one safetensors file of the artifact: hashed on the way, not written again after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from artifact.hashing import combined_hash
from artifact.steps import StepContext
from artifact.tensor_file import StoredTensor, write_tensors

TENSORS = "tensors"
Check = Callable[[Path, list[StoredTensor]], None]


def store_tensors(
    step: StepContext, file: str, header: bytes, planned: list[StoredTensor], data: Iterable[memoryview], *, check: Check
) -> list[StoredTensor]:
    """Write one file of the artifact, or find it finished; arguments and errors as of ``write_tensors``.

    ``check`` gets the file before it has its name, and raises where it must not have it.

    Returns:
        The planned tensors with their checksums.
    """
    entry = step.finished(file)
    if entry is not None and list(entry.get(TENSORS, ())) == [tensor.name for tensor in planned]:
        return [replace(tensor, sha256=entry[TENSORS][tensor.name]) for tensor in planned]
    with step.write_hashed(file) as (temporary, known):
        written = write_tensors(temporary, header, planned, data)
        check(temporary, written)
        known["sha256"] = combined_hash(header, (tensor.sha256 for tensor in written))
        known[TENSORS] = {tensor.name: tensor.sha256 for tensor in written}
    return written
