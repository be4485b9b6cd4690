"""engines/lengths.py: which attention lengths mask, and what a network can't be given."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from artifact.errors import EngineError
from engines.lengths import lengths_by_attention

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float16[B,4,S,8] query, float16[B,2,8,8] keys, float16[B,2,8,8] values, bool[B,1,S,8] mask, int64[B] lengths, int32[B] short)
  => (float16[B,4,S,8] x, float16[B,4,S,8] y, float16[B,4,S,8] z)
{
    [first] x = Attention<is_causal=1, scale=1.0>(query, keys, values, , , , lengths)
    [second] y = Attention<is_causal=1, scale=1.0>(query, keys, values, , , , lengths)
    [masked] z = Attention<scale=1.0>(query, keys, values, mask)
}
"""


def test_names_the_attention_that_lengths_mask() -> None:
    assert lengths_by_attention(ir.from_onnx_text(TEXT).graph) == {"first": "lengths", "second": "lengths"}


def test_a_node_without_a_name_is_called_as_tensorrt_calls_it() -> None:
    graph = ir.from_onnx_text(TEXT.replace("[second] ", "")).graph
    for node in graph:
        node.name = None if node.name != "first" else node.name
    assert lengths_by_attention(graph) == {"first": "lengths", "node_of_y": "lengths"}


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("[first] x = Attention<is_causal=1, ", "[first] x = Attention<", "'first' .*: it is not causal"),
        ("[second] y", "[first] y", "'first' .*: another node has its name"),
        (
            "[second] y = Attention<is_causal=1, scale=1.0>(query, keys, values, ,",
            "[second] y = Attention<is_causal=1, scale=1.0>(query, keys, values, mask,",
            "'second' .*: it has a mask",
        ),
        (", , , lengths)\n    [second]", ", , , short)\n    [second]", "'first' .*: 'short' is no graph input of int64"),
        ("    [first]", "    sum = Add(lengths, lengths)\n    [first]", None),
    ],
)
def test_refuses_what_a_network_cannot_be_given(before: str, after: str, reason: str | None) -> None:
    assert before in TEXT
    text = TEXT.replace(before, after)
    if reason is None:
        text, reason = text.replace(", , , lengths)\n    [second]", ", , , sum)\n    [second]"), "'first' .*: 'sum' is no graph input of int64"
    with pytest.raises(EngineError, match=reason) as error:
        lengths_by_attention(ir.from_onnx_text(text).graph)
    assert error.value.hint == "fuse again: python cli.py fuse ART --force"
