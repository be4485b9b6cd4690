"""engines/targets.py: names, aliases, and capabilities that the compiler knows."""

from __future__ import annotations

import pytest

from artifact.errors import EngineError
from engines.targets import ALIASES, TARGETS, find_target


def test_alias_is_the_80_gb_card() -> None:
    target = find_target("a100")
    assert (target.name, target.compute_capability, target.memory_gb) == ("a100-80gb", (8, 0), 80)


def test_refuses_an_unknown_name_and_lists_all() -> None:
    with pytest.raises(EngineError) as error:
        find_target("h100")
    assert all(name in str(error.value) for name in (*TARGETS, *ALIASES))
    assert error.value.hint == "--target a100-80gb"


@pytest.mark.parametrize("name", TARGETS)
def test_tensorrt_rtx_builds_for_the_capability(name: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu12 is not installed")
    major, minor = TARGETS[name].compute_capability
    assert hasattr(trt.ComputeCapability, f"SM{major}{minor}")
