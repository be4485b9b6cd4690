"""Plain and driven roundings of every form are sound; what no rounding gives is found, however small beside the rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from graphs.quantize.rounder import Rounder, prepare, round_by
from graphs.quantize.rounding import FACTORS, Format, Grid, largest_over, round_plainly
from graphs.quantize.statistics import SiteStatistics
from validation.bisect.rounded_weight import rounded_misfit

Floats = NDArray[np.float32]
ROWS, COLUMNS = 96, 128
FORMS = {
    "int8": (-127, 127, COLUMNS, 127, ()),
    "int4": (-8, 7, 32, 7, FACTORS),
}


def grid_of(form: str, dtype: type = np.float32) -> Grid:
    if form.startswith("onnxruntime"):
        return Format(int(form[-1]), 32).grid(np.dtype(dtype))
    low, high, block, largest, factors = FORMS[form]
    return Grid(low, high, block, largest_over(largest, np.dtype(dtype)), factors)


@pytest.fixture(scope="module")
def exact() -> Floats:
    random = np.random.default_rng(0)
    spread = np.exp(random.normal(0, 0.5, (ROWS, 1))) * np.exp(random.normal(0, 0.3, COLUMNS))
    return (random.standard_t(5, (ROWS, COLUMNS)) * spread * 0.02).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def stored(exact: Floats) -> Callable[[str, bool], Floats]:
    """What a form makes of the weight, plainly or by what 200 inputs ask for; scales in float16."""
    random = np.random.default_rng(1)
    inputs = (random.normal(0, 1, (200, 12)) @ random.normal(0, 1, (12, COLUMNS)) + random.normal(0, 0.3, (200, COLUMNS))).astype(np.float32)
    site = SiteStatistics(np.abs(inputs).max(axis=0), np.square(inputs).mean(axis=0), inputs, inputs[:1] * 3)

    def make(form: str, driven: bool) -> Floats:
        grid = grid_of(form, np.float16)
        found = round_plainly(exact, grid)
        levels, scale = round_by(prepare(site).feedback, exact, grid, found) if driven else found
        return (levels * grid.spread(scale, COLUMNS)).astype(np.float32)

    return make


@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("form", ["int8", "int4", "onnxruntime 8", "onnxruntime 4"])
def test_a_sound_rounding_is_none_and_a_factor_of_a_hundredth_is_found(
    exact: Floats, stored: Callable[[str, bool], Floats], form: str, driven: bool
) -> None:
    ours, grid = stored(form, driven), grid_of(form)
    assert not np.array_equal(ours, exact)
    assert rounded_misfit(ours, exact, grid).share < 0.8
    whole = rounded_misfit(ours * np.float32(1.01), exact, grid)
    assert whole.share > 1
    assert whole.words.endswith(f"{ROWS} of {ROWS} rows are no rounding of the checkpoint's")
    row = ours.copy()
    row[5] *= np.float32(1.01)
    found = rounded_misfit(row, exact, grid)
    assert found.share > 1
    assert found.words.endswith(f"; 1 of {ROWS} rows are no rounding of the checkpoint's")
    assert {"int8": "row 5 ", "onnxruntime 8": " of row 5 "}.get(form, " of row 5 has a scale that is 1.01") in found.words


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_driven_rounding_differs_from_plain(stored: Callable[[str, bool], Floats], form: str) -> None:
    """Else the case above would be one."""
    assert not np.array_equal(stored(form, True), stored(form, False))


def test_a_damaged_scale_of_one_block_is_named(exact: Floats, stored: Callable[[str, bool], Floats]) -> None:
    ours = stored("int4", False)
    ours[7, 64:96] *= np.float32(1.3)
    assert rounded_misfit(ours, exact, grid_of("int4")).words.startswith("block 2 of row 7 ")


def test_a_value_that_is_levels_off_is_named(exact: Floats, stored: Callable[[str, bool], Floats]) -> None:
    for form, levels in (("int8", 2), ("int4", 3)):
        ours, grid = stored(form, False), grid_of(form)
        scale = float(grid.scale_of(grid.blocked(exact), 1.0)[9, 0])
        place = int(np.abs(ours[9, :32]).argmin())
        ours[9, place] += np.float32(levels * scale)
        found = rounded_misfit(ours, exact, grid)
        assert found.share > 1
        assert "row 9 has a value that is " in found.words
        assert levels - 0.51 < found.error < levels + 0.51


def test_a_value_between_two_levels_is_named(exact: Floats, stored: Callable[[str, bool], Floats]) -> None:
    ours = stored("int8", False)
    ours[4, 3] += np.float32(0.4 * np.abs(exact[4]).max() / 127)
    assert rounded_misfit(ours, exact, grid_of("int8")).words.startswith("row 4 holds values that are no whole levels of its scale")


def test_levels_that_all_lean_one_way_are_found_by_size(exact: Floats) -> None:
    """Cut off and not rounded: every level is one beside the nearest at most, and the row is smaller than it was."""
    grid = grid_of("int8")
    scale = grid.scale_of(grid.blocked(exact), 1.0)
    found = rounded_misfit((np.trunc(exact / scale * np.float32(1 + 1e-6)) * scale).astype(np.float32), exact, grid)
    assert found.share > 1
    assert "is multiplied by 0.9" in found.words


def test_a_column_that_is_multiplied_within_a_level_is_found_by_size() -> None:
    """Of many rows: no level is more than one beside the nearest, and all of them are larger."""
    weight = np.random.default_rng(2).normal(0, 1, (2048, 64)).astype(np.float32)
    weight[:, 11] = np.clip(weight[:, 11] * 0.3, -0.6, 0.6)
    grid = Grid(-127, 127, 64, largest_over(127, np.dtype(np.float32)))
    scale, damaged = grid.scale_of(weight[:, None], 1.0), weight.copy()
    damaged[:, 11] *= np.float32(1.02)
    ours = (np.rint(damaged / scale) * scale).astype(np.float32)
    assert rounded_misfit((np.rint(weight / scale) * scale).astype(np.float32), weight, grid).share < 0.8
    found = rounded_misfit(ours, weight, grid)
    assert found.share > 1
    assert found.words == "column 11 is multiplied by 1.02"


def test_levels_that_came_with_the_checkpoint_have_scales_of_their_own(exact: Floats) -> None:
    """Its float weight is level × scale, rounded once, whatever the largest level."""
    levels = np.rint(exact / np.abs(exact).max(axis=1, keepdims=True) * 90)
    scale = np.abs(exact).max(axis=1, keepdims=True) / 71
    weight = (levels * scale).astype(np.float16).astype(np.float32)
    assert rounded_misfit((levels * scale.astype(np.float16)).astype(np.float32), weight, grid_of("int8")).share < 1


def test_zeros_are_zeros(exact: Floats) -> None:
    weight = exact.copy()
    weight[3] = 0
    grid = grid_of("int8")
    levels, scale = Rounder().round(weight, "model.layers.0.mlp.down_proj", grid)
    ours = (levels * scale).astype(np.float32)
    assert rounded_misfit(ours, weight, grid).share < 0.8
    ours[3, 2] = 1e-4
    assert rounded_misfit(ours, weight, grid).words.startswith("row 3 is not zero, as the checkpoint's is")
