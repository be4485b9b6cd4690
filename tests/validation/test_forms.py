"""How schemes round, as forms: what is quantised, what becomes of the rest, and what the search of smoothing is given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from artifact.calibration import CALIBRATION
from artifact.errors import QuantizationError
from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from graphs.quantize.int8 import FORM
from graphs.quantize.rounder import Rounder
from graphs.quantize.smoothing import search
from graphs.quantize.statistics import Divided, Statistics
from validation.calibration import write_statistics
from validation.calibration_text import CalibrationText
from validation.forms import FORMS, search_sites
from validation.reference import Reference
from validation.rounded_once import RoundedOnce

LAYER = "model.layers.1"
PACKED = [f"{LAYER}.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")]
APART = [f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"]


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return Reference(checkpoint.config, checkpoint.read)


@pytest.fixture(scope="module")
def statistics(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    folder = tmp_path_factory.mktemp("statistics")
    ids = np.random.default_rng(0).integers(0, 64, (3, 24))
    write_statistics(StepContext(folder), reference, CalibrationText(tuple(ids), None, "t.txt", "abc", 1), "fingerprint", CALIBRATION)
    return Statistics(folder / "calibration.safetensors")


def test_int8_rounds_weights_alone_and_leaves_the_rest_in_float(reference: Reference, statistics: Statistics) -> None:
    forms = FORMS["int8"](reference, statistics, PACKED, "fp16", {})
    chosen = forms.of(PACKED[:2])
    assert list(chosen) == PACKED[:2]
    assert {(form.columns, form.activation_scale) for form in chosen.values()} == {(None, None)}
    weight = _weight(reference, "self_attn.o_proj")
    expected = rounded(weight, PACKED[1], Rounder(statistics), "float16")
    found = chosen[PACKED[1]].weight(PACKED[1], torch.from_numpy(weight)).numpy()
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, rounded(weight, PACKED[1], Rounder(), "float16"))  # rounding has seen the inputs


def _weight(reference: Reference, name: str) -> np.ndarray:
    return reference.read(f"{LAYER}.{name}.weight").float().numpy()


def rounded(weight: np.ndarray, name: str, rounder: Rounder, scale_dtype: str) -> np.ndarray:
    levels, scale = rounder.round(weight, name, FORM.grid(name, weight.shape[1], np.dtype(scale_dtype)))
    return levels * scale


def test_a_weight_is_rounded_once_and_leaves_no_file(statistics: Statistics, tmp_path: Path) -> None:
    weight = np.random.default_rng(2).standard_normal((6, 8)).astype(np.float32)
    rounder = Rounder()
    once = RoundedOnce(rounder, "float32", tmp_path)
    first = once("model.layers.0.mlp.up_proj", weight)
    rounder.round = None  # type: ignore[method-assign, assignment]
    np.testing.assert_array_equal(once("model.layers.0.mlp.up_proj", weight), first)
    assert list(tmp_path.iterdir()) == []


def test_many_weights_need_one_open_file(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    once = RoundedOnce(Rounder(), "float32", tmp_path)
    weights = {f"model.layers.{layer}.mlp.up_proj": np.full((2, 4), layer + 1, np.float32) for layer in range(20)}
    for _ in range(2):
        for name, weight in weights.items():
            np.testing.assert_allclose(once(name, weight), weight, rtol=1e-6)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    del once
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_levels_that_do_not_fit_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    once = RoundedOnce(Rounder(), "float32", tmp_path)
    monkeypatch.setattr(once, "_file", SimpleNamespace(seek=lambda *_: 0, write=full))
    with pytest.raises(QuantizationError, match="24 bytes of levels don't fit beside the artifact: No space left on device") as caught:
        once("model.layers.0.mlp.up_proj", np.ones((4, 6), np.float32))
    assert "make room" in str(caught.value.hint)


def test_smoothquant_rounds_inputs_by_what_was_searched_and_keeps_the_rest_weight_only(reference: Reference, statistics: Statistics) -> None:
    forms = FORMS["int8-smoothquant"](reference, statistics, PACKED, "fp32", search_sites(reference, statistics, PACKED))
    chosen = forms.of(PACKED[1:])
    assert (chosen[PACKED[0]].columns, chosen[PACKED[0]].activation_scale) == (None, None)
    weight = np.concatenate([reference.read(f"{LAYER}.mlp.{name}.weight").float().numpy() for name in ("gate_proj", "up_proj")])
    expected = search(weight, statistics.of(PACKED[2]))
    np.testing.assert_array_equal(chosen[PACKED[2]].columns, expected.vector)
    assert chosen[PACKED[2]].activation_scale == expected.activation_scale
    assert forms.smoothing is not None
    assert set(forms.smoothing) == set(PACKED)
    down, name = _weight(reference, "mlp.down_proj"), PACKED[3]
    vector = forms.smoothing[name].vector
    stored = rounded(down * vector, name, Rounder(Divided(statistics, {name: vector})), "float32")
    np.testing.assert_array_equal(chosen[name].weight(name, torch.from_numpy(down)).numpy(), stored / vector)


def test_linears_that_are_not_packed_share_the_search_of_their_site(reference: Reference, statistics: Statistics) -> None:
    forms = FORMS["int8-smoothquant"](reference, statistics, APART, "fp16", search_sites(reference, statistics, APART))
    assert forms.smoothing is not None
    assert set(forms.smoothing) == {PACKED[2]}
    together = FORMS["int8-smoothquant"](reference, statistics, PACKED, "fp16", search_sites(reference, statistics, PACKED))
    for name in APART:
        np.testing.assert_array_equal(forms.quantised[name].columns, together.quantised[PACKED[2]].columns)
