"""How schemes round, as forms: what is quantised, what becomes of the rest, and what the search of smoothing is given."""

from __future__ import annotations

import numpy as np
import pytest

from artifact.progress import silent
from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from graphs.quantize.smoothing import search
from graphs.quantize.statistics import Statistics
from validation.calibration import write_statistics
from validation.calibration_text import CalibrationText
from validation.forms import FORMS
from validation.reference import Reference

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
    write_statistics(StepContext(folder), reference, CalibrationText(tuple(ids), None, "t.txt", "abc", 1), "fingerprint")
    return Statistics(folder / "calibration.safetensors")


def test_int8_rounds_weights_alone_and_leaves_the_rest_in_float(reference: Reference, statistics: Statistics) -> None:
    forms = FORMS["int8"](reference, statistics, PACKED, "fp16", silent)
    chosen = forms.of(PACKED[:2])
    assert list(chosen) == PACKED[:2]
    assert {(form.columns, form.activation_scale, form.scale_dtype) for form in chosen.values()} == {(None, None, "float16")}


def test_smoothquant_rounds_inputs_by_what_was_searched_and_keeps_the_rest_weight_only(reference: Reference, statistics: Statistics) -> None:
    forms = FORMS["int8-smoothquant"](reference, statistics, PACKED, "fp32", silent)
    chosen = forms.of(PACKED[1:])
    assert (chosen[PACKED[0]].columns, chosen[PACKED[0]].activation_scale, chosen[PACKED[0]].scale_dtype) == (None, None, "float32")
    weight = np.concatenate([reference.read(f"{LAYER}.mlp.{name}.weight").float().numpy() for name in ("gate_proj", "up_proj")])
    expected = search(weight, statistics.of(PACKED[2]))
    np.testing.assert_array_equal(chosen[PACKED[2]].columns, expected.vector)
    assert chosen[PACKED[2]].activation_scale == expected.activation_scale
    assert forms.smoothing is not None
    assert set(forms.smoothing) == set(PACKED)


def test_linears_that_are_not_packed_share_the_search_of_their_site(reference: Reference, statistics: Statistics) -> None:
    forms = FORMS["int8-smoothquant"](reference, statistics, APART, "fp16", silent)
    assert forms.smoothing is not None
    assert set(forms.smoothing) == {PACKED[2]}
    together = FORMS["int8-smoothquant"](reference, statistics, PACKED, "fp16", silent)
    for name in APART:
        np.testing.assert_array_equal(forms.quantised[name].columns, together.quantised[PACKED[2]].columns)
