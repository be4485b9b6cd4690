"""engines/plan_shapes.py: a plan's own arithmetic is followed from its inputs to every other size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from engines.plan_layers import PlanReader
from engines.plan_program import read_programs
from engines.plan_shapes import PROBES, Sizes, read_instructions

Built = Callable[..., tuple[Any, Path]]
TEXT = """
  copy={ name="copy_s2d_1" output={"rows" } input={"total" }  stream=0 }
  add={ name="a_0" output={"total" } input={"past" "new" } stream=0  layers="" }
  mul={ name="b_0" output={"values" } input={"rows" "__s^64i64" } stream=0  layers="" }
  gt={ name="c_0" output={"larger" } input={"values" "past" } stream=0  layers="" }
  select={ name="d_0" output={"largest" } input={"larger" "values" "past" } stream=0  layers="" }
  softmax={ name="e_0" output={"unknown" } input={"past" } stream=0  layers="" }
  mul={ name="f_0" output={"lost" } input={"unknown" "past" } stream=0  layers="" }
"""
BATCH, NEW, PAST = PROBES["batch_size"], PROBES["sequence_length"], PROBES["past_sequence_length"]


def test_follows_arithmetic_copies_and_constants() -> None:
    shapes = (["batch_size", "sequence_length"], ["batch", "new"]), (["batch_size", 3, "past_sequence_length", 64], ["batch", 3, "past", 64])
    sizes = Sizes(read_instructions(TEXT), shapes)
    assert sizes.elements(["batch", "rows"]) == BATCH * (PAST + NEW)
    assert sizes.elements(["largest"]) == 64 * (PAST + NEW)
    assert sizes.elements([]) == 1


def test_does_not_guess_what_it_cannot_follow() -> None:
    sizes = Sizes(read_instructions(TEXT), [(["past_sequence_length"], ["past"])])
    assert sizes.elements(["total"]) is None  # nobody says how many tokens are new
    assert sizes.elements([2, "lost"]) is None
    assert Sizes(read_instructions(TEXT), [(["heads"], ["past"])]).elements(["past"]) is None  # an axis without a number


def test_an_axis_that_the_plan_fixes_has_the_plans_size() -> None:
    sizes = Sizes((), [(["batch_size", "sequence_length"], ["batch", 1]), (["batch_size", 3, "past_sequence_length", 64], ["batch", 3, "past", 64])])
    assert (sizes.axes["sequence_length"], sizes.axes["total_sequence_length"]) == (1, PAST + 1)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_every_result_of_a_real_plan_has_a_size(built: Built, precision: str) -> None:
    stage, plan = built(2, precision)
    reader = PlanReader(ir.load(stage.engine_graph).graph, stage.config)
    for program in read_programs(plan):
        sizes = reader.sizes(program)
        results = [sizes.elements(tensor.dims) for kernel in program.kernels for tensor in kernel.writes]
        assert len(results) >= len(program.kernels)
        assert None not in results
