"""Whether a mask hides every key behind a query's own: computed at two sizes, so that how it is put together need not be understood.

An operator that is causal by itself may take a mask's place only where the mask is causal too. Exporters write that in dozens of ways (triangles,
comparisons of ranges, sums of two masks), and all of them follow from the sizes of the inputs, the padding mask and the positions; what depends on
anything else is refused. This is a trial, not a proof: a mask that opens beyond a thousand columns alone would pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from artifact.io_spec import BATCH, PAST, SEQUENCE, TOTAL
from graphs.fusions._reading import Refused, shape_of
from graphs.fusions._rotary_tables import LARGEST_TABLE_BYTES

Array = np.ndarray[Any, Any]
SAMPLES: tuple[Mapping[str, int], ...] = tuple({BATCH: 2, SEQUENCE: new, PAST: past, TOTAL: past + new} for new, past in ((700, 0), (67, 900)))
"""A prompt, and a piece of one over a past. In a step there is no key behind the query's own."""
PADDED = 3
"""Columns on the left that hold no tokens, in all rows of the batch but the first."""
IDS_RANK, INTEGERS = 2, (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
"""Most axes, and the dtypes, of positions and padding masks."""


def check_causal(mask: ir.Value) -> None:
    """Raise Refused where a boolean mask [B, 1, S, T] lets query i of S see a key behind T − S + i, or depends on what is not known.

    Rows of padding may see whatever they do: nothing reads them.
    """
    for sample in SAMPLES:
        seen = _Sample(sample).value(mask)
        columns, own = np.arange(sample[TOTAL]), np.arange(sample[SEQUENCE])[:, None] + sample[PAST]
        later = (seen & (columns > own)).reshape(-1, len(own), len(columns))
        if later[0].any() or later[1:, own[:, 0] >= PADDED].any():
            raise Refused(f"the mask lets a query see keys behind its own: {sample[SEQUENCE]} new tokens over a past of {sample[PAST]}")


class _Sample:
    """Values of a graph at one set of sizes."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._known: dict[ir.Value, Array] = {}

    def value(self, value: ir.Value) -> Array:
        """Elements of a value; raises Refused for what depends on more than sizes, padding and positions."""
        if value not in self._known:
            node = value.producer()
            if node is None:
                self._known[value] = self._given(value)
            elif node.op_type == "Shape":
                shape = self._shape(node.inputs[0])
                self._known[value] = np.array(shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(shape))], np.int64)
            else:
                self._compute(node)
        return self._known[value]

    def _compute(self, node: ir.Node) -> None:
        feeds = {str(one.name): self.value(one) for one in node.inputs if one is not None}
        assert node.graph is not None
        try:
            with np.errstate(all="ignore"):  # sums of two smallest numbers
                outputs = ReferenceEvaluator(ir.to_proto(node), opsets={"": node.graph.opset_imports[""]}).run(None, feeds)
        except Exception as error:  # the evaluator's operators raise whatever numpy does
            raise Refused(f"the mask can't be computed: {node.op_type}: {error}") from error
        self._known |= dict(zip(node.outputs, map(np.asarray, outputs), strict=True))

    def _given(self, value: ir.Value) -> Array:
        """Elements of a constant or of an input: padding on the left but for the first row, positions counted from the past on."""
        tensor = value.const_value
        if tensor is not None:
            if tensor.nbytes > LARGEST_TABLE_BYTES:
                raise Refused(f"the mask depends on {value.name}, {tensor.nbytes:,} bytes")
            return np.asarray(tensor.numpy())
        shape = shape_of(value)
        if value.dtype in INTEGERS and 0 < len(shape) <= IDS_RANK:
            if "position" in str(value.name).lower() and shape[-1] == SEQUENCE:
                return self._typed(value, np.arange(self._sizes[PAST], self._sizes[TOTAL]))
            if "mask" in str(value.name).lower() and shape[1:] == (TOTAL,):
                rows = np.ones(self._shape(value), np.int64)
                rows[1:, :PADDED] = 0
                return self._typed(value, rows)
        raise Refused(f"the mask depends on {value.name} {list(shape)}, neither a padding mask nor positions: which keys it hides is not known")

    def _typed(self, value: ir.Value, elements: Array) -> Array:
        assert value.dtype is not None
        return np.broadcast_to(elements, self._shape(value)).astype(value.dtype.numpy())

    def _shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """Sizes of a value, from their names where all have one."""
        assert value is not None
        found = [size if isinstance(size, int) else self._sizes.get(str(size)) for size in shape_of(value)]
        return tuple(size for size in found if size is not None) if found and None not in found else self.value(value).shape
