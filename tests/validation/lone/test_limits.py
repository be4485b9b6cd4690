"""What a graph can't be asked for is left out with its reason; the rest is run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from graphs.foreign.ports import Port
from validation.lone.graph import open_lone_graph
from validation.lone.limits import _takes_columns, plan_scenarios
from validation.scenarios import make_scenarios


@pytest.fixture
def graph(pinned, exported_from):
    return open_lone_graph(pinned("optimum-18.onnx"), exported_from.config, exported_from.source)


@pytest.fixture
def scenarios(exported_from):
    ids = np.zeros(64, np.int64)
    return make_scenarios(exported_from.config, ids, ids[:30])


def plan(graph, scenarios, **ports):
    return plan_scenarios(replace(graph, ports=replace(graph.ports, **ports)), scenarios)


def test_a_graph_that_takes_everything_is_asked_for_everything(graph, scenarios) -> None:
    assert plan(graph, scenarios).scenarios == scenarios
    assert plan(graph, scenarios).not_run == ()


@pytest.mark.parametrize(
    ("ports", "reason"),
    [
        ({"attention_mask": None}, "it has no mask input"),
        ({"input_ids": Port("input_ids", ir.DataType.INT64, (1, None))}, "its batch is fixed to 1"),
        (
            {"position_ids": Port("cache_position", ir.DataType.INT64, (None,))},
            "its input cache_position INT64 [?] gives all rows the same positions",
        ),
    ],
)
def test_what_can_not_be_padded_is_not_padded(graph, scenarios, ports, reason) -> None:
    found = plan(graph, scenarios, **ports)
    assert [scenario.name for scenario in found.scenarios] == ["prefill", "decode", "chunked"]
    ((name, said),) = found.not_run
    assert name == "padded"
    assert said == reason


def test_without_a_past_there_is_one_call(graph, scenarios) -> None:
    found = plan(graph, scenarios, past=())
    assert [(scenario.name, len(scenario.chunks)) for scenario in found.scenarios] == [("prefill", 1), ("padded", 1)]
    assert [name for name, _ in found.not_run] == ["decode", "chunked", "padded, steps"]


def test_one_position_a_call_is_judged_where_there_are_many_calls(graph, scenarios) -> None:
    found = plan(graph, scenarios, logits=Port("logits", ir.DataType.FLOAT, (None, 1, 32)))
    assert [scenario.name for scenario in found.scenarios] == ["decode", "padded"]
    assert [(name, reason.partition(";")[0]) for name, reason in found.not_run] == [
        ("prefill", "a call gives one position, 1 in all"),
        ("chunked", "a call gives one position, 3 in all"),
    ]


GROUPED_GRAPH = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
g (float[B,S,8] x, int64[B,T] attention_mask, float[B,1,S,T] other, int32[B] lengths, int32 total) => (float[B,S,8] y)
{
    wide = Cast<to=1>(attention_mask)
    bias = Unsqueeze(wide, total)
    y = com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=2, do_rotary=ROTARY>(INPUTS)
}"""
PLAIN = "x, x, x, , , lengths, total"


@pytest.mark.parametrize(
    ("inputs", "rotary", "takes"),
    [
        (f"{PLAIN}, , , , bias", 0, True),
        (f"{PLAIN}, , , , bias", 1, False),
        (f"{PLAIN}, , , , other", 0, False),
        (PLAIN, 0, False),
    ],
)
def test_a_bias_of_the_mask_without_rotation_takes_columns(inputs, rotary, takes) -> None:
    graph = ir.from_onnx_text(GROUPED_GRAPH.replace("ROTARY", str(rotary)).replace("INPUTS", inputs)).graph
    assert _takes_columns(graph[-1], "attention_mask") is takes
