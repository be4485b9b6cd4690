"""Tensors of a step into one safetensors file of the artifact: hashed on the way, and not read again for the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from artifact.hashing import combined_hash
from artifact.steps import StepContext
from artifact.tensor_file import StoredTensor, write_tensors

TENSORS = "tensors"


def store_tensors(step: StepContext, file: str, header: bytes, planned: list[StoredTensor], data: Iterable[memoryview]) -> list[StoredTensor]:
    """Write one file of the artifact, or find it finished; arguments and errors as of ``write_tensors``.

    Returns:
        The planned tensors with their checksums.
    """
    entry = step.finished(file)
    if entry is not None and list(entry.get(TENSORS, ())) == [tensor.name for tensor in planned]:
        return [replace(tensor, blake3=entry[TENSORS][tensor.name]) for tensor in planned]
    return store_anew(step, file, header, planned, data)


def store_anew(step: StepContext, file: str, header: bytes, planned: list[StoredTensor], data: Iterable[memoryview]) -> list[StoredTensor]:
    """As ``store_tensors``, for data that is reported on while it is made: it is written whether it was finished before or not."""
    with step.write_hashed(file) as (temporary, known):
        written = write_tensors(temporary, header, planned, data)
        known["sha256"] = combined_hash(header, (tensor.blake3 for tensor in written))
        known[TENSORS] = {tensor.name: tensor.blake3 for tensor in written}
    return written
