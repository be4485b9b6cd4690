"""graphs/quantize/smoothing_file.py: what is read is what was found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from artifact.errors import ArtifactError, QuantizationError
from artifact.steps import Report, StepContext, run_step
from graphs.quantize.smoothing import Smoothing
from graphs.quantize.smoothing_file import read_smoothing, smoothing_file, write_smoothing

SCHEME = "int8-smoothquant"
FOUND = {
    "model.layers.0.mlp.down_proj": Smoothing(np.array([0.5, 2], np.float32), 0.25, 0.85, 1.15, 0.004, 0.001, 0.3),
    "model.layers.0.self_attn.qkv_proj": Smoothing(np.ones(3, np.float32), 1e-3, None, 1.0, 0.1, float("nan"), 0.1),
}


def written(folder: Path) -> Report:
    return run_step(folder, "export", {}, lambda step: write_smoothing(StepContext(step.artifact), SCHEME, FOUND)).report


def test_reads_what_was_written(tmp_path: Path) -> None:
    report = written(tmp_path)
    assert report == {"file": "smoothing-int8-smoothquant.npz", "sites": 2, "alphas": {"0.85": 1, "None": 1}}
    found = read_smoothing(tmp_path, SCHEME)
    assert list(found) == list(FOUND)
    for site, one in found.items():
        np.testing.assert_array_equal(one.vector, FOUND[site].vector)
        np.testing.assert_equal(one.as_report(), FOUND[site].as_report())


def test_the_same_search_is_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("one", "other"):
        written(tmp_path / name)
        contents.append((tmp_path / name / smoothing_file(SCHEME)).read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY"])
def test_a_damaged_file_is_refused_with_the_command_that_makes_it(content: bytes, tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / smoothing_file(SCHEME)).write_bytes(content)
    with pytest.raises((QuantizationError, ArtifactError)) as caught:
        read_smoothing(tmp_path, SCHEME)
    assert f"quantize {tmp_path} --scheme {SCHEME}" in str(caught.value.hint)
