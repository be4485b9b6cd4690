"""Reading calibration statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from artifact.errors import QuantizationError
from graphs.quantize.statistics import FIELDS, Statistics

SITE = "model.layers.0.mlp.down_proj"


def test_reads_a_site_in_float32(tmp_path: Path) -> None:
    tensors = {f"{SITE}.{field}": np.full(3, number, np.float16 if number > 1 else np.float32) for number, field in enumerate(FIELDS)}
    save_file(tensors, tmp_path / "calibration.safetensors", metadata={"seed": "0"})
    statistics = Statistics(tmp_path / "calibration.safetensors")
    site = statistics.of(SITE)
    assert statistics.metadata == {"seed": "0"}
    for number, field in enumerate(FIELDS):
        assert getattr(site, field).dtype == np.float32
        np.testing.assert_array_equal(getattr(site, field), np.full(3, number))


def test_refuses_a_site_it_does_not_know(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "calibration.safetensors")
    with pytest.raises(QuantizationError, match=r"has no statistics of model\.layers\.0\.mlp\.down_proj: it was made for another model"):
        Statistics(tmp_path / "calibration.safetensors").of(SITE)


@pytest.mark.parametrize("content", [None, b"not a safetensors file"])
def test_refuses_a_file_that_can_not_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "calibration.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QuantizationError, match="can't be read as calibration statistics"):
        Statistics(path, hint="python cli.py quantize A")
