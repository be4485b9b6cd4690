"""The queries of a group as rows of their one key head: how graphs/lowering/attention.py writes grouped heads, read backwards.

query [B, H, S, D] ─ Reshape [0, K, -1, 0] → [B, K, H/K·S, D] ─ attention, its mask H/K times below itself ─ Reshape [0, H, -1, 0]
"""

from __future__ import annotations

import onnx_ir as ir

from graphs.fusions._reading import Refused, first, need, shape_of, user
from graphs.fusions._values import numbers, producer

ROWS_AXIS = 2
NOT_STACKED = "the queries of a group are stacked as rows of one head, their mask is not"


def unstacked(query: ir.Value, attended: ir.Value) -> tuple[ir.Value, ir.Value, int]:
    """Query and result before and behind the stacking, and how many queries are a group; as they are, and 1, where nothing is stacked."""
    stacked, apart = producer(query, "Reshape"), user(attended, "Reshape")
    if stacked is not None and apart is not None:
        match shape_of(first(stacked)), numbers(stacked.inputs[1]), numbers(apart.inputs[1]):
            case (_, int(n_query), _, _), (0, int(n_key), -1, 0), (0, int(n_heads), -1, 0) if n_heads == n_query:
                return first(stacked), apart.outputs[0], n_query // n_key
    return query, attended, 1


def mask_of_one(mask: ir.Value, group: int) -> ir.Value:
    """The mask of each query of a group; raises Refused unless theirs is that one, as often below itself."""
    if group == 1:
        return mask
    joined = need(mask, "Concat", otherwise=NOT_STACKED)
    once = first(joined)
    if tuple(joined.inputs) != (once,) * group or joined.attributes.get_int("axis") != ROWS_AXIS:
        raise Refused(NOT_STACKED)
    return once
