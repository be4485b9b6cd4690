"""What the exporter's mask says: which columns hold tokens, and that a query sees those before its own column, and its own."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphs.fusions._reading import Refused, operands
from graphs.fusions._values import module_of, numbers, producer, scalar, sizes

MASK_RANK = 4


@dataclass(frozen=True)
class CausalMask:
    """mask [B, 1, S, T] = (column < row and padding) or column = row, where row = past + 0 … S − 1.

    Attributes:
        padding: bool [B, 1, 1, T], true where a column holds a token.
        columns: int64 [T], 0 … T − 1.
        total: int64, T.
        new: int64, S.
        module: where the mask is computed, outside all layers.
    """

    padding: ir.Value
    columns: ir.Value
    total: ir.Value
    new: ir.Value
    module: str


def read_mask(mask: ir.Value) -> CausalMask:
    """The parts of a mask; raises Refused unless it is the exporter's."""
    parts = operands(mask, "Or")
    for seen, itself in (parts, parts[::-1]) if parts else ():
        own, before = operands(itself, "Equal"), operands(seen, "And")
        if own is None or before is None:
            continue
        for earlier, padding in (before, before[::-1]):
            if operands(earlier, "Less") == own:
                columns, rows = own
                return _checked(padding, columns, rows, module_of(mask))
    raise Refused("the mask is not: (column < row and the column holds a token) or column = row")


def _checked(padding: ir.Value, columns: ir.Value, rows: ir.Value, module: str) -> CausalMask:
    shape = sizes(padding)
    if padding.dtype != ir.DataType.BOOL or shape is None or len(shape) != MASK_RANK or shape[1:3] != (1, 1):
        raise Refused(f"which columns hold tokens is {padding.dtype} {shape}, not bool [B, 1, 1, T]")
    shifted = operands(rows, "Add")
    turned = producer(shifted[0], "Unsqueeze") if shifted else None
    total, new = _limit(columns), _limit(turned.inputs[0]) if turned is not None and numbers(turned.inputs[1]) == (1,) else None
    if total is None or new is None:
        raise Refused("columns and rows of the mask are not counted from 0 to the number of columns and of new tokens")
    return CausalMask(padding, columns, total, new, module)


def _limit(counted: ir.Value | None) -> ir.Value | None:
    """N of Range(0, n, 1)."""
    node = producer(counted, "Range")
    return node.inputs[1] if node is not None and (scalar(node.inputs[0]), scalar(node.inputs[2])) == (0, 1) else None
