"""An artifact's own weights as tensors, one at a time: what is quantised is what is calibrated on."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from artifact.errors import ArtifactError
from artifact.tensor_file import read_checksums
from exporter.checkpoints.file_tensor import FileTensor
from validation.reference import Read


def artifact_reader(artifact: Path) -> Read:
    """Name of a weight (Hugging Face's) → its tensor as stored, in memory of its own.

    Raises:
        ArtifactError: there is no list of the weights; or, when one is read, it is not in the list or its file is not there.
        CheckpointError: the file has become shorter.
    """
    stored = read_checksums(artifact)

    def read(name: str) -> Tensor:
        if name not in stored:
            raise ArtifactError(f"{artifact} holds no {name}", hint=f"python cli.py inspect {artifact} --verify")
        place = stored[name]
        try:
            return FileTensor.contiguous(artifact / place.file, place.dtype, place.shape, place.offset, place.length).read()
        except FileNotFoundError as error:
            raise ArtifactError(f"{artifact} has no {place.file}, which holds {name}", hint=f"python cli.py inspect {artifact} --verify") from error

    return read
