"""graphs/quantize/given.py: a checkpoint's own levels and scales, found again in the weights that they made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from artifact.errors import QuantizationError
from artifact.given import GIVEN_FILE, SMALLEST_SCALE, Given
from artifact.layout import members
from artifact.manifest import FORMAT, write_manifest
from graphs.quantize.given import GivenRounder, GivenScales, check_scheme, given_scales, stored_scales, to_levels
from graphs.quantize.rounding import Grid, largest_over

INT8 = Given("compressed-tensors", "pack-quantized", 8, 0, "float", 7)
LAYER = "model.layers.0"
O_PROJ = f"{LAYER}.self_attn.o_proj"


def write(folder: Path, given: Given | None, scales: dict[str, np.ndarray] | None = None) -> Path:
    """An artifact's manifest and its file of scales."""
    model = {"name": "x", "source": "/x", "dtype": "fp16", "config": {}} | ({"quantization": given.as_record()} if given else {})
    write_manifest(folder, {"format": FORMAT, "model": model, "steps": {}})
    if scales is not None:
        save_file(scales, folder / GIVEN_FILE)
    return folder


def opened(folder: Path, given: Given, scales: dict[str, np.ndarray]) -> GivenScales:
    found = given_scales(write(folder, given, scales))
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 32), (4, 64)])
@pytest.mark.parametrize("smallest", [SMALLEST_SCALE, 1e-4, 0.02])
def test_every_level_is_found_again_whatever_its_scale(dtype: type, bits: int, group: int, smallest: float) -> None:
    """All levels, against scales from the smallest that is allowed on; 96 columns, so that 64 does not divide them."""
    rng = np.random.default_rng(0)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    levels = rng.integers(low, high + 1, (256, 96)).astype(np.int8)
    levels[:, 0], levels[:, 1] = low, high
    scales = (smallest * rng.uniform(1, 3, (256, -(-96 // group) if group else 1))).astype(np.float32)
    each = np.repeat(scales, group, axis=1)[:, :96] if group else scales
    weight = (levels * each).astype(dtype).astype(np.float32)
    assert np.array_equal(to_levels(weight, scales, Given("m", "f", bits, group, "float"), "x"), levels)


def test_weight_that_is_no_level_times_its_scale_is_refused() -> None:
    scales = np.full((2, 1), 0.01, np.float32)
    weight = np.array([[0.01, 0.02], [0.03, 0.045]], np.float32)
    with pytest.raises(QuantizationError, match=r"x\.weight is not int8 × the checkpoint's scales: a value lies 0\.5 of a scale beside one"):
        to_levels(weight, scales, INT8, "x")


@pytest.mark.parametrize("value", [1.28, -1.29])
def test_level_beyond_the_bits_is_refused(value: float) -> None:
    with pytest.raises(QuantizationError, match=r"is not int8 × the checkpoint's scales: its levels are -?\d+ … \d+"):
        to_levels(np.array([[value]], np.float32), np.full((1, 1), 0.01, np.float32), INT8, "x")


def test_scales_are_rounded_to_the_nearest_and_refused_where_that_moves_a_level() -> None:
    exact = np.array([[0.0123], [2.0**-20 * 1.0]], np.float32)
    assert np.array_equal(stored_scales(exact, np.dtype(np.float16), 8, "x"), exact.astype(np.float16))
    assert np.array_equal(stored_scales(exact, np.dtype(np.float32), 8, "x"), exact)
    with pytest.raises(QuantizationError, match=r"x: the scale 4\.39e-07 of row 1 is too small for float16") as caught:
        stored_scales(np.array([[1.0], [2.0**-22 * 1.84]], np.float32), np.dtype(np.float16), 8, "x")
    assert caught.value.hint == "export with --dtype fp32"


def test_packed_linear_takes_its_members_scales_one_after_the_other(tmp_path: Path) -> None:
    names = members(f"{LAYER}.mlp.gate_up_proj")
    assert names == (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj")
    tensors = {f"{name}.weight_scale": np.full((3, 1), 1 + at, np.float32) for at, name in enumerate(names)}
    scales = opened(tmp_path, INT8, tensors | {f"{names[0]}.input_scale": np.array([0.5], np.float32)})
    assert scales.covers(f"{LAYER}.mlp.gate_up_proj")
    assert not scales.covers(f"{LAYER}.self_attn.qkv_proj")
    assert scales.scales(f"{LAYER}.mlp.gate_up_proj")[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert scales.input_scale(f"{LAYER}.mlp.gate_up_proj") == 0.5
    assert scales.input_scale(f"{LAYER}.mlp.down_proj") is None


def test_static_scales_that_differ_give_the_largest(tmp_path: Path) -> None:
    names = members(f"{LAYER}.self_attn.qkv_proj")
    tensors = {f"{name}.input_scale": np.array([size], np.float32) for name, size in zip(names, (0.25, 1.0, 0.5), strict=True)}
    assert opened(tmp_path, INT8, tensors).input_scale(f"{LAYER}.self_attn.qkv_proj") == 1.0


def grid(bits: int, block: int, scale_dtype: type = np.float16) -> Grid:
    high = (1 << (bits - 1)) - 1
    return Grid(-high - 1, high, block, largest_over(high, np.dtype(scale_dtype)))


def test_row_of_zeros_takes_any_scale(tmp_path: Path) -> None:
    given = opened(tmp_path, INT8, {f"{O_PROJ}.weight_scale": np.array([[1e-9], [0.5]], np.float32)})
    rounder = GivenRounder(given=given)
    levels, scales = rounder.round(np.array([[0, 0], [0.5, -1]], np.float16), O_PROJ, grid(8, 2))
    assert levels.tolist() == [[0, 0], [1, -2]]
    assert scales.tolist() == [[1], [0.5]]
    assert rounder.errors[O_PROJ].report() == {"weight_rms": 0}


@pytest.mark.parametrize(("group", "columns", "block"), [(64, 128, 32), (64, 128, 64), (0, 64, 32), (128, 192, 64), (32, 64, 32)])
def test_group_is_one_block_or_several_with_one_scale(tmp_path: Path, group: int, columns: int, block: int) -> None:
    rng = np.random.default_rng(2)
    chosen = rng.integers(-8, 8, (6, columns)).astype(np.int8)
    groups = rng.uniform(0.01, 0.02, (6, -(-columns // group) if group else 1)).astype(np.float16).astype(np.float32)
    each = np.repeat(groups, group or columns, axis=1)[:, :columns]
    given = opened(tmp_path, Given("m", "f", 4, group, "float"), {f"{O_PROJ}.weight_scale": groups})
    rounder = GivenRounder(given=given)
    levels, scales = rounder.round((chosen * each).astype(np.float32), O_PROJ, grid(4, block))
    assert np.array_equal(levels, chosen)
    assert scales.shape == (6, columns // block)
    assert np.array_equal(np.repeat(scales, block, axis=1), each)
    assert rounder.errors[O_PROJ].report()["weight_rms"] < 1e-6


def test_error_is_what_rounding_the_scale_costs(tmp_path: Path) -> None:
    scale = np.array([[0.0123]], np.float32)
    given = opened(tmp_path, INT8, {f"{O_PROJ}.weight_scale": scale})
    rounder = GivenRounder(given=given)
    rounder.round(np.array([[0.0123 * 100, 0.0123 * -28]], np.float16), O_PROJ, grid(8, 2))
    assert 0 < rounder.errors[O_PROJ].report()["weight_rms"] < 2.0**-10


def test_artifact_of_an_unquantised_checkpoint_has_none(tmp_path: Path) -> None:
    assert given_scales(write(tmp_path, None)) is None
    check_scheme(tmp_path, "int8", "onnxruntime")


def test_lost_file_of_scales_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=f"has no {GIVEN_FILE}") as caught:
        given_scales(write(tmp_path, INT8))
    assert str(caught.value.hint).startswith("python cli.py export --checkpoint /x")


@pytest.mark.parametrize(
    ("given", "scheme", "hint"),
    [
        (INT8, "int8-smoothquant", "quantize {0} --scheme int8 "),
        (Given("m", "f", 4, 64, "float"), "int8", "quantize {0} --scheme int4 "),
        (Given("m", "f", 8, 0, "static"), "int8", "quantize {0} --scheme int8-smoothquant "),
        (Given("m", "f", 8, 0, "dynamic"), "int4", "quantize {0} --scheme int8-smoothquant "),
        (Given("m", "f", 8, 64, "float"), "int8", "build {0} --precision fp16 "),
        (Given("m", "f", 4, 48, "float"), "int4", "build {0} --precision fp16 "),
    ],
)
def test_another_scheme_is_refused_with_the_one_that_fits(tmp_path: Path, given: Given, scheme: str, hint: str) -> None:
    with pytest.raises(QuantizationError, match=rf"was quantised already \({given.method} .*\): {scheme} would round .* a second time") as caught:
        check_scheme(write(tmp_path, given), scheme, "tensorrt")
    assert str(caught.value.hint).startswith("python cli.py " + hint.format(tmp_path))


def test_another_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="are taken for the target tensorrt, not for onnxruntime"):
        check_scheme(write(tmp_path, INT8), "int8", "onnxruntime")
