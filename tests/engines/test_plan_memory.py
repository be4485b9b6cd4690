"""engines/plan_memory.py: a real plan's regions, held against the rule that predicts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.device_fit import Load
from engines.device_fit import activation_bytes as predicted
from engines.plan_memory import read_activation_bytes


def test_prefill_asks_for_what_is_predicted_and_decode_for_little(built: Callable[..., Any]) -> None:
    stage, plan = built(2, "fp16")
    found = read_activation_bytes(plan, ["prefill", "decode"])
    assert found["prefill"] == pytest.approx(predicted(stage.config, Load("fp16", 2, 256)), rel=0.02)
    assert 0 < found["decode"] < found["prefill"]


def test_regions_on_the_device_are_counted_weights_and_the_hosts_are_not(tmp_path: Path) -> None:
    header = """header {
  version = 5
  region = { name=devmem_topdown_0 size=300 alignment=128 type=user place=accelerator unified=false }
  region = { name=devmem_topdown_1 size=45 alignment=128 type=user place=accelerator unified=false }
  region = { name=system_hmem size=7 alignment=128 type=system place=host unified=false }
  region = { name=__mye1-consts size=9000 alignment=128 type=system place=accelerator unified=false constant=true }
  inputs={ "input_ids%s.1" }
}
"""
    plan = tmp_path / "model.plan"
    plan.write_text("".join(header % profile for profile in ("", " [profile 1]", " [profile 1]")))
    assert read_activation_bytes(plan, ["prefill", "decode"]) == {"prefill": 345, "decode": 690}
