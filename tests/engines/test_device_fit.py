"""engines/device_fit.py: what fits a GPU, how many it takes, and what would fit instead."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from artifact.presets import preset
from engines.device_fit import OTHERS, Load, activation_bytes, device_memory, fit, load_of
from engines.targets import find_target

STATIC, HALF = "a cache that is written in place: export --kv-cache static", OTHERS["fp16"]


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
    assert not (found["fits"] and found["instead"])


OFFERS = [  # size, precision, target, rows; what is offered
    ("13b", "int8", "a100-40gb", 4, ["--precision int4", "--max-batch 3", "--max-length 3584", STATIC]),
    ("13b", "int8", "a30", 4, ["--max-length 1280"]),
    ("7b", "fp32", "a100-40gb", 4, [HALF, "--precision int8", "--precision int4", "--max-batch 1", "--max-length 1280"]),
    ("70b", "fp16", "l4", 4, []),
]


@pytest.mark.parametrize(("size", "precision", "target", "rows", "offers"), OFFERS)
def test_each_thing_offered_instead_is_built_and_fits_alone(size: str, precision: str, target: str, rows: int, offers: list[str]) -> None:
    """INT8 is never built for one row: a batch of one is no way out for it."""
    config, gpu = preset(size), find_target(target)

    def verdict(given: str) -> bool:
        options = {"precision": precision, "--max-batch": rows, "--max-length": 4096, "--kv-cache": "dynamic"}
        words = given.replace(",", "").split()
        values = dict(pairwise(words))
        options |= {"precision": values.get("--precision", precision), "--kv-cache": values.get("--kv-cache", "dynamic")}
        options |= {name: int(values[name]) for name in ("--max-batch", "--max-length") if name in values}
        static = options["--kv-cache"] == "static"
        bound = {"max_length": None, "capacity": 4096} if static else {"max_length": options["--max-length"]}
        load = load_of(config, options["precision"], options["--kv-cache"], max_batch=options["--max-batch"], **bound)
        return bool(fit(config, load, gpu)["fits"])

    assert not verdict("")
    assert fit(config, load_of(config, precision, "dynamic", max_batch=rows, max_length=4096), gpu)["instead"] == offers
    assert all(map(verdict, offers))


def test_int4_is_not_offered_where_rows_are_not_whole_blocks() -> None:
    config = replace(preset("13b"), intermediate_size=13_820)
    assert "--precision int4" not in fit(config, Load("int8", 4, 4096), find_target("a100-40gb"))["instead"]


def test_parts_for_several_gpus_are_no_way_out_of_this_runner() -> None:
    found = fit(preset("13b"), Load("fp16", 4, 4096), find_target("a100-40gb"))
    assert "needs 2 of them, in parts; this runner uses one: weights" in found["words"]
    assert not [words for words in found["instead"] if "--parts" in words]


@pytest.mark.parametrize(("layers", "words"), [(80, "needs more than 8 of them"), (2, "does not fit, a layer on each of 2 neither")])
def test_no_more_gpus_are_spoken_of_than_there_are_layers(layers: int, words: str) -> None:
    config = replace(preset("70b"), num_hidden_layers=layers)
    assert words in fit(config, Load("fp32", 64, 4096), find_target("l4"))["words"]
