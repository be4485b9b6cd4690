"""The past's length is that of the mask less the new tokens; its other sizes stay, and what can't be counted is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.io_spec import BATCH, PAST, SEQUENCE, TOTAL
from graphs.fusions import foreign_past_length
from graphs.fusions._reading import apply_reader

B, K, P, D, S = 2, 3, 4, 8, 5
SHAPES = {"past": [BATCH, K, PAST, D], "ids": [BATCH, SEQUENCE], "positions": [BATCH, SEQUENCE], "m": [BATCH, TOTAL], "other": [PAST, D]}


def make(graph, attributes: str = "", source: str = "past", other: str = "", **shapes) -> ir.Model:
    inputs = "float[B,K,P,D] past, int64[B,S] ids, int64[B,S] positions, int64[B,T] m, float[P,D] other"
    model = graph(f"g ({inputs}) => (int64[N] sizes) {{ {other} sizes = Shape{attributes}({source}) }}")
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        if value.name in SHAPES | shapes:
            value.shape = ir.Shape((SHAPES | shapes)[value.name])
    return model


def feeds(random, past: int = P) -> dict[str, np.ndarray]:
    made = {"past": random(B, K, past, D), "other": random(past, D), "m": np.ones((B, P + S), np.int64)}
    return made | {name: np.zeros((B, S), np.int64) for name in ("ids", "positions")}


@pytest.mark.parametrize("attributes", ["", "<start=2, end=3>", "<start=2>", "<end=3>", "<start=1, end=4>", "<start=-2, end=-1>"])
@pytest.mark.parametrize("batch", [BATCH, B])
def test_sizes_stay_and_no_longer_depend_on_the_buffer(graph, run, random, attributes, batch):
    model = make(graph, attributes, **{name: [batch, *sizes[1:]] for name, sizes in SHAPES.items() if name != "other"})
    before = run(model, feeds(random))[0]
    result = apply_reader(model, foreign_past_length)
    assert (result.fired, result.refused) == (1, [])
    assert [node.op_type for node in model.graph].count("Concat") == (len(before) > 1)
    np.testing.assert_array_equal(run(model, feeds(random))[0], before)
    np.testing.assert_array_equal(run(model, feeds(random, past=P + 7))[0], before)
    assert [value.name for value in model.graph.outputs] == ["sizes"]


NO_CANDIDATES = {
    "the batch": {"attributes": "<end=1>"},
    "all before the length": {"attributes": "<start=0, end=2>"},
    "the head size": {"attributes": "<start=3>"},
    "another input": {"source": "ids"},
    "an input of two axes": {"source": "other"},
    "a computed value": {"source": "half", "other": "half = Cast<to=10>(m)", "half": SHAPES["past"]},
    "a buffer of fixed capacity": {"past": [BATCH, K, 64, D]},
    "the past on another axis": {"past": [BATCH, PAST, K, D]},
}


@pytest.mark.parametrize("changes", NO_CANDIDATES.values(), ids=NO_CANDIDATES)
def test_other_sizes_are_left_alone(graph, changes):
    assert not any(foreign_past_length.is_candidate(node) for node in make(graph, **changes).graph)


UNCOUNTED = "no mask [B, T] and token ids [B, S] are fed to count the past by, so past and present can't be one buffer"
REFUSED = {
    "no mask": ({"m": [BATCH, 99]}, UNCOUNTED),
    "a mask of four axes": ({"m": [BATCH, 1, SEQUENCE, TOTAL]}, UNCOUNTED),
    "a mask turned": ({"m": [TOTAL, BATCH]}, UNCOUNTED),
    "no tokens": ({"ids": [BATCH, 1], "positions": [SEQUENCE]}, UNCOUNTED),
    "heads of unknown number": ({"past": [BATCH, None, PAST, D]}, f"a past of None heads of {D} elements: not known how many"),
    "heads of unknown size": ({"past": [BATCH, K, PAST, None]}, f"a past of {K} heads of None elements: not known how many"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_reason(graph, changes, reason):
    result = apply_reader(make(graph, **changes), foreign_past_length)
    assert (result.fired, [refusal.reason for refusal in result.refused]) == (0, [reason])


READERS = {
    "Transpose": "y = Transpose(past)",
    "Mul": "y = Mul(past, other)",
    "MultiHeadAttention": "y = com.microsoft.MultiHeadAttention<num_heads=1>(, past)",
    "GroupQueryAttention": "y = GroupQueryAttention(past)",
}


@pytest.mark.parametrize(("name", "reader"), READERS.items())
def test_other_readers_of_a_past_are_named_and_keep_its_length(graph, name, reader):
    result = apply_reader(make(graph, other=reader), foreign_past_length)
    reason = f"{name} reads the past, so past and present can't be one buffer"
    assert (result.fired, [refusal.reason for refusal in result.refused]) == (0, [reason] * 2)


def test_the_operator_that_shares_the_buffer_may_read_it(graph):
    model = make(graph, other="y, k, v = com.microsoft.GroupQueryAttention<num_heads=3, kv_num_heads=3>(, , , past, past)")
    assert [foreign_past_length.is_candidate(node) for node in model.graph] == [False, True]
    assert apply_reader(model, foreign_past_length).fired == 1
