"""engines/device_fit.py: what fits a GPU, how many it takes, and what would fit instead."""

from __future__ import annotations

import pytest

from artifact.presets import preset
from engines.device_fit import Load, activation_bytes, device_memory, fit
from engines.targets import find_target


def test_activations_are_those_of_built_plans() -> None:
    """Regions that plans of TensorRT-RTX 1.7.1 ask for at 4 rows of 4,096 tokens: 13B widths 2,334 MB."""
    assert activation_bytes(preset("13b"), Load("fp16", 4, 4096)) == pytest.approx(2_333_622_272, rel=0.01)


def test_caches_are_two_sets_where_they_grow_and_one_where_they_are_written_in_place() -> None:
    dynamic, static = (device_memory(preset("7b"), Load("fp16", 4, 4096, form)) for form in ("dynamic", "static"))
    assert (dynamic.kv_cache, static.kv_cache) == (2 * 4 * 4096 * 524_288, 4 * 4096 * 524_288)


@pytest.mark.parametrize(
    ("size", "precision", "target", "gpus"),
    [
        ("7b", "fp16", "a100-40gb", 1),
        ("13b", "fp16", "a100-40gb", 2),
        ("13b", "fp16", "a100-80gb", 1),
        ("70b", "fp16", "a100-80gb", 2),
        ("70b", "fp16", "a100-40gb", 5),
        ("70b", "fp32", "l4", None),
    ],
)
def test_how_many_gpus(size: str, precision: str, target: str, gpus: int | None) -> None:
    found = fit(preset(size), Load(precision, 4, 4096), find_target(target))
    assert (found["gpus"], found["fits"]) == (gpus, gpus == 1)
    assert found["needs"]["total"] == sum(value for name, value in found["needs"].items() if name != "total")
    assert (found["instead"] == []) == (gpus in (1, None)), found["instead"]


def test_each_thing_offered_instead_fits_alone() -> None:
    config, target, load = preset("13b"), find_target("a100-40gb"), Load("int8", 4, 4096)
    found = fit(config, load, target)
    assert found["instead"][:3] == ["--precision int4", "--max-batch 3", "--max-length 3584"]
    for other in (Load("int4", 4, 4096), Load("int8", 3, 4096), Load("int8", 4, 3584), Load("int8", 4, 4096, "static")):
        assert fit(config, other, target)["fits"], other
    assert not fit(config, Load("int8", 4, 3840), target)["fits"]
    assert found["instead"][-1] == "2 GPUs, one part each: --parts 2"
