"""engines/weight_search.py: how often a weight stands in a file, in which layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from engines.graph_weights import Weight
from engines.weight_search import Copies, count_copies

RNG = np.random.default_rng(2)


def weight(name: str, array: np.ndarray) -> Weight:
    return Weight(name, ir.tensor(array, name=name), ("n",), quantized=False)


def plan_of(tmp_path: Path, *pieces: bytes) -> Path:
    path = tmp_path / "x.plan"
    path.write_bytes(b"".join(pieces))
    return path


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
@pytest.mark.parametrize("shape", [(64, 128), (512, 32), (40, 8), (33, 96)])
def test_finds_each_layout(tmp_path: Path, dtype: type, shape: tuple[int, int]) -> None:
    arrays = [RNG.integers(-100, 100, shape).astype(dtype) for _ in range(4)]
    weights = [weight(name, array) for name, array in zip(("raw", "turned", "both", "none"), arrays, strict=True)]
    raw, turned = arrays[0].tobytes(), np.ascontiguousarray(arrays[1].T).tobytes()
    both = arrays[2].tobytes() + bytes(-arrays[2].nbytes % 8) + np.ascontiguousarray(arrays[2].T).tobytes()
    pieces = [piece + bytes(-len(piece) % 8) for piece in (raw, turned, both)]
    plan = plan_of(tmp_path, b"header--" * 5, *pieces)
    assert count_copies(plan, weights) == [Copies("raw", 1, 0), Copies("turned", 0, 1), Copies("both", 1, 1), Copies("none", 0, 0)]


def test_finds_a_weight_that_is_not_aligned(tmp_path: Path) -> None:
    array = RNG.integers(-100, 100, (64, 64)).astype(np.int8)
    plan = plan_of(tmp_path, b"odd", array.tobytes())
    assert count_copies(plan, [weight("w", array)]) == [Copies("w", 1, 0)]


def test_counts_two_raw_copies(tmp_path: Path) -> None:
    array = RNG.integers(-100, 100, (64, 64)).astype(np.int8)
    assert count_copies(plan_of(tmp_path, array.tobytes(), bytes(64), array.tobytes()), [weight("w", array)])[0].as_stored == 2


def test_sample_avoids_what_repeats(tmp_path: Path) -> None:
    array = np.zeros((64, 64), np.float16)
    array[17 * 2, :] = RNG.normal(size=64)
    array[:, 40] = RNG.normal(size=64)
    plan = plan_of(tmp_path, bytes(100_000), array.tobytes())
    assert count_copies(plan, [weight("sparse", array)])[0].as_stored == 1


def test_finds_a_transposed_weight_whose_halves_are_stored_apart(tmp_path: Path) -> None:
    """Where gate·up is split on its last axis, the plan keeps gate and up as two transposed matrices."""
    array = RNG.normal(size=(384, 64)).astype(np.float16)
    halves = [np.ascontiguousarray(half.T).tobytes() for half in np.split(array, 2)]
    assert count_copies(plan_of(tmp_path, halves[0], bytes(64), halves[1]), [weight("gate_up", array)]) == [Copies("gate_up", 0, 1)]


def test_finds_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.weight_search.BLOCK_WORDS", 16)
    arrays = [RNG.integers(-100, 100, (24, 24)).astype(np.int8) for _ in range(20)]
    plan = plan_of(tmp_path, *(array.tobytes() for array in arrays), b"tail")
    assert [copies.total for copies in count_copies(plan, [weight(str(i), array) for i, array in enumerate(arrays)])] == [1] * 20


def test_finds_levels_of_four_bits_as_they_are_stored(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (64, 48), np.uint8)
    file = tmp_path / "levels.bin"
    file.write_bytes(stored.tobytes())
    tensor = ir.ExternalTensor(file.name, 0, stored.nbytes, ir.DataType.INT4, shape=ir.Shape((64, 96)), name="w", base_dir=tmp_path)
    levels = Weight("w", tensor, ("linear",), quantized=True)
    assert levels.parameters == 64 * 96
    np.testing.assert_array_equal(levels.stored(), stored)
    assert count_copies(plan_of(tmp_path, stored.tobytes()), [levels]) == [Copies("w", 1, 0)]


def test_finds_every_weight_of_a_plan_whose_constants_all_stand_beside_their_places(tmp_path: Path) -> None:
    """More of them than are searched byte by byte, behind a constant of odd length; one of them twice, one not at all."""
    arrays = [RNG.integers(-100, 100, (64, 64)).astype(np.int8) for _ in range(20)]
    plan = plan_of(tmp_path, bytes(13), *(array.tobytes() for array in (*arrays[:-1], arrays[0])))
    found = count_copies(plan, [weight(f"w{index}", array) for index, array in enumerate(arrays)])
    assert [copies.total for copies in found] == [2, *[1] * 18, 0]
