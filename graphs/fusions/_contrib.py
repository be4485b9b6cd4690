"""Nodes of ONNX Runtime's own operators (domain com.microsoft), recorded and then put in the place of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.tape import Tape

CONTRIB, CONTRIB_VERSION = "com.microsoft", 1
GROUPED, SEQLENS, TOTAL, BIAS = "GroupQueryAttention", 5, 6, 10
"""Its attention, and its inputs for the length of each row less one [B], for the largest length, and for what is added to the scores."""


class Recorder(Tape):
    """New nodes by operator: ``op.Split(x, sizes, axis=2, _outputs=2)``; the same calls as in a rule's ``rewrite``."""

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        def record(*inputs: ir.Value | None, _domain: str = "", _outputs: int = 1, **attributes: Any) -> Any:
            if _outputs == 1:
                return self.op(op_type, inputs, attributes, domain=_domain)
            return self.op_multi_out(op_type, inputs, attributes, domain=_domain, num_outputs=_outputs)

        return record


def place(graph: ir.Graph, before: ir.Node, recorded: Recorder, replaced: Sequence[tuple[ir.Value, ir.Value]]) -> None:
    """Insert recorded nodes, and let new values take over from old ones: uses, name, type, shape and place among the graph's outputs."""
    graph.opset_imports.setdefault(CONTRIB, CONTRIB_VERSION)
    for value in recorded.initializers:
        if value.name not in graph.initializers:
            graph.register_initializer(value)
    graph.insert_before(before, recorded.nodes)
    for old, new in replaced:
        name, old.name = old.name, None
        new.name = name
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
