"""Which elements of a tensor are a mask's fill values, and not results: an overflow there is no overflow.

A fill is a constant of -10,000 or less (-inf, the least float). What is made of fills, token ids and masks alone is a mask: all of it is exempt.
Where a mask meets scores (Where, Add, Cast …), elements of -5,000 or less are masked scores; the scores themselves are looked at where
they are made. A softmax ends it. NaN is never exempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

FILL, MASKED = -1e4, -5e3
FLOATS = frozenset({ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_SPREADS_FILL = frozenset("Add Cast Concat Expand Gather Identity Min Reshape Slice Squeeze Sub Transpose Tile Unsqueeze Where".split())
_INLINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Masks:
    """Values of a graph that hold fills.

    Attributes:
        whole: masks.
        scores: scores that a mask has met.
    """

    whole: frozenset[ir.Value]
    scores: frozenset[ir.Value]

    def results(self, value: ir.Value, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The elements of a value that are results; the array itself where none is exempt."""
        if value in self.whole:
            wrong: npt.NDArray[Any] = array[np.isnan(array)]
            return wrong
        if value in self.scores:
            unmasked: npt.NDArray[Any] = array[~(array <= MASKED)]  # NaN stays
            return unmasked
        return array


def find_masks(graph: ir.Graph) -> Masks:
    """Follow the fills of a graph.

    Args:
        graph: sorted topologically; inputs with their dtypes.
    """
    data = {value for value in graph.inputs if value.dtype in FLOATS}
    data |= {value for value in graph.initializers.values() if value.dtype in FLOATS and not _is_inline(value)}
    whole = {value for value in graph.initializers.values() if _is_fill(value)}
    scores: set[ir.Value] = set()
    for node in graph:
        holds_fill = not (whole.isdisjoint(node.inputs) and scores.isdisjoint(node.inputs))
        from_data = node.op_type != "Shape" and not data.isdisjoint(node.inputs)
        if from_data:
            data.update(node.outputs)
        if holds_fill and not from_data:
            whole.update(node.outputs)
        elif holds_fill and node.op_type in _SPREADS_FILL:
            scores.update(node.outputs)
    return Masks(frozenset(whole), frozenset(scores))


def _is_inline(value: ir.Value) -> bool:
    """A constant that belongs to the graph's structure: no external data and no weight's name."""
    tensor = value.const_value
    weight = (value.name or "").startswith(("model.", "lm_head."))
    return tensor is not None and not weight and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _INLINE_BYTES


def _is_fill(value: ir.Value) -> bool:
    return value.dtype in FLOATS and _is_inline(value) and value.const_value is not None and bool((value.const_value.numpy() <= FILL).any())
