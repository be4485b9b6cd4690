"""A mask is causal where no query sees a key behind its own, at any of the sizes that are tried; what can't be computed is refused in words."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from artifact.io_spec import BATCH, PAST, SEQUENCE, TOTAL
from graphs.fusions import _causal_samples
from graphs.fusions._causal_samples import check_causal
from graphs.fusions._reading import Refused

COUNTED = """
    sizeP = Shape<start=2, end=3>(past) p = Squeeze(sizeP) sizeS = Shape<start=1>(ids) s = Squeeze(sizeS) t = Add(p, s) sizeT = Add(sizeP, sizeS)
    columns = Range(zero, t, one) rows = Range(p, t, one) row = Unsqueeze(rows, axis1)
    """
INPUTS = (
    "int64[B,S] ids", "int64[B,T] attention_mask", "float[B,2,P,8] past", "int64[S] cache_position", "int32[B,S] position_ids",
    "bool[B,1,S,T] whole", "float[B,S] weighted", "int64[N] other", "float[N] odd", "int64[B,1,S] positions", "int64[B,S] token_type_ids",
    "int64 start_position", "float[B,T] float_mask", "int64[B,T] prompt", "int64[B,S] loss_mask", "int64[B,T] all_positions",
)  # fmt: skip
CONSTANTS = {
    "zero": 0,
    "one": 1,
    "axis1": [1],
    "axes": [1, 2],
    "both": [2, 3],
    "sides": [1, 3],
    "second_axis": [2],
    "last": [3],
    "three": 3,
    "first": [0],
    "front": [0, 1],
    "less": [[[[0]]], [[[1]]]],
    "triangle": np.tril(np.ones((1, 1, 1000, 1000), np.int64)),
}
AXES = {"B": BATCH, "S": SEQUENCE, "P": PAST, "T": TOTAL, "N": None}


def mask_of(graph, body: str) -> ir.Value:
    """The value ``mask``, in a graph whose inputs have the axes that measuring gives them."""
    constants = {name: np.array(value, np.int64) for name, value in CONSTANTS.items()}
    declared = [f"int64[{','.join(map(str, array.shape))}] {name}" if array.shape else f"int64 {name}" for name, array in constants.items()]
    model = graph(f"g ({', '.join([*INPUTS, *declared])}) => (bool[B,1,S,T] mask) {{{COUNTED}{body}\n}}", constants)
    for value in model.graph.inputs:
        value.shape = ir.Shape([size if isinstance(size, int) else AXES[size.value] for size in value.shape])
    return model.graph.outputs[0]


CAUSAL = {
    "a comparison of ranges": "mask = LessOrEqual(columns, row)",
    "columns before the own one": "mask = Less(columns, row)",
    "padding beside it": "held = Unsqueeze(attention_mask, axes) real = Cast<to=9>(held) seen = LessOrEqual(columns, row) mask = And(seen, real)",
    "counted positions": "own = Unsqueeze(cache_position, axis1) mask = LessOrEqual(columns, own)",
    "positions of each row": """
        long = Cast<to=7>(position_ids) own = Unsqueeze(long, sides) before = Sub(own, less) mask = LessOrEqual(columns, before)""",
    "a triangle that is cut": """
        from = Concat<axis=0>(sizeP, first) to = Concat<axis=0>(sizeT, sizeT) part = Slice(triangle, from, to, both) mask = Cast<to=9>(part)""",
    "the shape of a value whose sizes have no names": """
        seen = LessOrEqual(columns, row) size = Shape(seen) mask = Reshape(seen, size)""",
    "one axis of a named shape": """
        size = Shape<start=-1>(attention_mask) n = Squeeze(size) every = Range(zero, n, one) mask = LessOrEqual(every, row)""",
}


@pytest.mark.parametrize("body", CAUSAL.values(), ids=CAUSAL)
def test_causal_masks_pass(graph, body):
    check_causal(mask_of(graph, body))


LATER = {
    "everything": ("size = Concat<axis=0>(sizeS, sizeT) ones = Expand(one, size) mask = Cast<to=9>(ones)", (700, 0)),
    "columns behind the own one": ("mask = GreaterOrEqual(columns, row)", (700, 0)),
    "one column more": ("next = Add(row, one) mask = LessOrEqual(columns, next)", (700, 0)),
    "a past that is counted twice": ("twice = Add(row, p) mask = LessOrEqual(columns, twice)", (67, 900)),
    "a column more in the second row of the batch": (
        "late = Unsqueeze(row, front) next = Add(late, less) mask = LessOrEqual(columns, next)",
        (700, 0),
    ),
}


@pytest.mark.parametrize(("body", "at"), LATER.values(), ids=LATER)
def test_masks_that_show_later_keys_are_refused(graph, body, at):
    with pytest.raises(Refused, match=f"^the mask lets a query see keys behind its own: {at[0]} new tokens over a past of {at[1]}$"):
        check_causal(mask_of(graph, body))


UNKNOWN = "neither a padding mask nor positions: which keys it hides is not known"
REFUSED = {
    "a mask that is fed": ("mask = And(whole, whole)", f"the mask depends on whole ['{BATCH}', 1, '{SEQUENCE}', '{TOTAL}'], {UNKNOWN}"),
    "numbers that are fed": ("mask = Cast<to=9>(weighted)", f"the mask depends on weighted ['{BATCH}', '{SEQUENCE}'], {UNKNOWN}"),
    "an input of another kind": ("mask = Cast<to=9>(other)", f"the mask depends on other [None], {UNKNOWN}"),
    "positions of three axes": ("mask = Cast<to=9>(positions)", f"the mask depends on positions ['{BATCH}', 1, '{SEQUENCE}'], {UNKNOWN}"),
    "the size of such an input": ("size = Shape(odd) mask = Cast<to=9>(size)", f"the mask depends on odd [None], {UNKNOWN}"),
    "an operator that fails": ("parts = Concat<axis=0>(axis1, axes) mask = Reshape(columns, parts)", "the mask can't be computed: Reshape: "),
}


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_a_reason(graph, body, reason):
    with pytest.raises(Refused) as refused:
        check_causal(mask_of(graph, body))
    assert str(refused.value).startswith(reason)


def test_refuses_to_read_what_is_as_large_as_a_weight(graph, monkeypatch):
    body = CAUSAL["a triangle that is cut"]
    monkeypatch.setattr(_causal_samples, "LARGEST_TABLE_BYTES", 8 * 10**6 - 1)
    with pytest.raises(Refused, match=r"^the mask depends on triangle, 8,000,000 bytes$"):
        check_causal(mask_of(graph, body))
    monkeypatch.setattr(_causal_samples, "LARGEST_TABLE_BYTES", 8 * 10**6)
    check_causal(mask_of(graph, body))


PADDED = "held = Unsqueeze(attention_mask, axes) real = Cast<to=9>(held) "


def test_rows_of_padding_may_see_whatever_they_do(graph):
    """As transformers opens fully masked rows."""
    own = "turned = Transpose<perm=[0,1,3,2]>(real) tail = Sub(sizeS, first) from = Sub(sizeT, tail) "
    body = own + "query = Slice(turned, from, sizeT, second_axis) padding = Not(query) seen = LessOrEqual(columns, row) mask = Or(seen, padding)"
    check_causal(mask_of(graph, PADDED + body))


WHOLE = (
    "least = Cast<to=7>(real) some = ReduceMin<keepdims=1>(least, last) full = Cast<to=9>(some) padded = Not(full) seen = LessOrEqual(columns, row) "
)
OPENED = {
    "where there is no padding": WHOLE + "mask = Or(seen, full)",
    "where there is padding": WHOLE + "mask = Or(seen, padded)",
    "to the first token behind padding": WHOLE + "it = Equal(row, three) opened = And(padded, it) mask = Or(seen, opened)",
}


@pytest.mark.parametrize("body", OPENED.values(), ids=OPENED)
def test_rows_with_padding_and_without_are_both_tried(graph, body):
    with pytest.raises(Refused, match="the mask lets a query see keys behind its own: 700 new tokens over a past of 0"):
        check_causal(mask_of(graph, PADDED + body))


OTHERS = {
    "types of tokens": "long = Cast<to=7>(token_type_ids) own = Unsqueeze(long, sides) mask = LessOrEqual(columns, own)",
    "another row for each column": "mask = Cast<to=9>(prompt)",
    "one number": "mask = Cast<to=9>(start_position)",
    "a mask of numbers": "held = Unsqueeze(float_mask, axes) mask = Cast<to=9>(held)",
    "a mask of the new tokens": "rows_of = Unsqueeze(loss_mask, sides) mask = Cast<to=9>(rows_of)",
    "positions of all columns": "mask = Cast<to=9>(all_positions)",
}


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_inputs_that_only_look_like_masks_or_positions_are_refused(graph, body):
    with pytest.raises(Refused, match="neither a padding mask nor positions: which keys it hides is not known"):
        check_causal(mask_of(graph, body))
