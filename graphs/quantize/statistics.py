"""What calibration measured of the inputs of linears, read from a scheme's ``calibration*.safetensors``; validation/calibration.py writes it.

A site is an input that one or more linears read, named by the packed projection (`model.layers.3.self_attn.qkv_proj`). Of each the file holds

    <site>.absmax       [in] float32: largest |value| of every channel, at all positions
    <site>.mean_square  [in] float32: mean of squares of every channel, position 0 left out
    <site>.samples      [n, in] float16: rows drawn by a seed from all positions but 0, the same ones at every site
    <site>.first        [m, in] float16: the rows at position 0 of the sequences (massive activations live there), one where all start with BOS
    <site>.part_absmax  [p, in] float32: largest |value| of every channel in each part of the text, position 0 left out

and its metadata ``part_samples``, how many of the sampled rows are of each part: what a scale made from the other parts does to a part is what it
does to a text that it has not seen.
Letters: n sampled rows, m sequences, p parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from artifact.errors import QuantizationError

FIELDS = ("absmax", "mean_square", "samples", "first")
PART_ABSMAX, PART_SAMPLES = "part_absmax", "part_samples"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SiteStatistics:
    """One site's, in float32; without parts where the text has none.

    Attributes:
        part_absmax: [p, in].
        part_samples: of each part, in the order of ``samples``.
    """

    absmax: Floats
    mean_square: Floats
    samples: Floats
    first: Floats
    part_absmax: Floats | None = None
    part_samples: tuple[int, ...] = ()


class Statistics:
    """An open file; a site is read when it is asked for.

    Raises:
        QuantizationError: the file is missing or is no safetensors file.
    """

    def __init__(self, path: Path, hint: str | None = None) -> None:
        self.path, self._file = path, _open(path, hint)
        self.metadata: dict[str, str] = dict(self._file.metadata() or {})

    def of(self, site: str) -> SiteStatistics:
        """The statistics of one site.

        Raises:
            QuantizationError: the file has none of that name.
        """
        try:
            found = SiteStatistics(*(self._file.get_tensor(f"{site}.{field}").astype(np.float32) for field in FIELDS))
            parts = tuple(int(count) for count in self.metadata.get(PART_SAMPLES, "").split())
            return replace(found, part_absmax=self._file.get_tensor(f"{site}.{PART_ABSMAX}"), part_samples=parts) if parts else found
        except SafetensorError as error:
            raise QuantizationError(f"{self.path} has no statistics of {site}: it was made for another model") from error


class Divided(Statistics):
    """Statistics of inputs once they are divided by a vector [in] a site: what the rounding of smoothed weights has to see."""

    def __init__(self, measured: Statistics, vectors: Mapping[str, Floats]) -> None:
        self.path, self.metadata = measured.path, measured.metadata
        self._measured, self._vectors = measured, vectors

    def of(self, site: str) -> SiteStatistics:
        """One site's, divided; of one without a vector as they are."""
        found, vector = self._measured.of(site), self._vectors.get(site)
        if vector is None:
            return found
        return SiteStatistics(found.absmax / vector, found.mean_square / vector / vector, found.samples / vector, found.first / vector)


def _open(path: Path, hint: str | None) -> Any:
    """The library's handle, whose stubs have no types."""
    try:
        return safe_open(str(path), framework="numpy")
    except (OSError, SafetensorError) as error:
        raise QuantizationError(f"{path} can't be read as calibration statistics: {error}", hint=hint) from error
