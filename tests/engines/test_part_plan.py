"""engines/part_plan.py: parts cover all layers once, are even, and are as few as fit."""

from __future__ import annotations

import pytest

from artifact.errors import EngineError
from artifact.presets import preset
from engines.part_plan import Limits, plan_parts, split
from engines.weight_sizes import weight_sizes

GB = 10**9


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 32])
def test_split_covers_every_layer_once_and_evenly(count: int) -> None:
    sizes = weight_sizes(preset("7b"), "fp16")
    found = split(sizes, count, tied=False)
    assert len(found) == count
    assert [layer for first, last in found for layer in range(first, last + 1)] == list(range(32))
    weights = [sizes.of_part(*part, tied=False) for part in found]
    assert max(weights) - min(weights) <= 2 * sizes.layer


def test_one_plan_where_it_fits() -> None:
    plan = plan_parts(preset("7b"), "fp16", Limits(None, 20 * GB, "20.0 GB of free memory"))
    assert plan.layers == ((0, 31),)
    assert plan.reason.startswith("one plan: building the whole takes about 14.")


def test_as_few_parts_as_the_memory_needs() -> None:
    plan = plan_parts(preset("13b"), "fp16", Limits(None, 16 * GB, "--max-memory, 16.0 GB"))
    assert len(plan.layers) == 2
    assert plan.reason == "2 parts: building the whole takes about 26.6 GB, more than --max-memory, 16.0 GB"


def test_linears_that_are_kept_out_of_a_precision_count() -> None:
    """Of half the linears kept in float16, INT8 weights are half as many again."""
    limits = Limits(None, 8 * GB, "8.0 GB of free memory")
    assert [len(plan_parts(preset("7b"), "int8", limits, scale=scale).layers) for scale in (1.0, 1.5)] == [1, 2]


def test_a_part_for_each_gpu() -> None:
    plan = plan_parts(preset("7b"), "fp16", Limits(None, 20 * GB, "", gpus=2, target="l4"))
    assert (len(plan.layers), plan.reason) == (2, "2 parts: l4 needs 2 GPUs, one part each; this runner uses one, and l4 does not hold the whole")


def test_a_number_that_was_asked_for_must_fit_too() -> None:
    assert len(plan_parts(preset("7b"), "fp16", Limits(4, 20 * GB, "")).layers) == 4
    with pytest.raises(EngineError, match=r"the largest of 2 parts needs about 7\.\d GB of memory, more than 4\.0 GB of free memory") as error:
        plan_parts(preset("7b"), "fp16", Limits(2, 4 * GB, "4.0 GB of free memory"))
    assert error.value.hint == "--parts auto cuts it to fit"


@pytest.mark.parametrize("parts", [0, 33])
def test_parts_have_a_layer_at_least(parts: int) -> None:
    with pytest.raises(EngineError, match="the model has 32 layers"):
        plan_parts(preset("7b"), "fp16", Limits(parts, 20 * GB, ""))


def test_a_layer_that_does_not_fit_is_said() -> None:
    with pytest.raises(EngineError, match="the largest of 80 parts needs about"):
        plan_parts(preset("70b"), "fp16", Limits(None, GB, "1.0 GB of free memory"))
