"""Nodes of ONNX Runtime's own operators (domain com.microsoft), recorded and then put in the place of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
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
        _register(graph, value)
    graph.insert_before(before, recorded.nodes)
    for old, new in replaced:
        name, old.name = old.name, None
        new.name = name
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _register(graph: ir.Graph, value: ir.Value) -> None:
    """Make a constant one of the graph's: of an equal one that has its name, users read that; beside another one it gets a name of its own."""
    known = graph.initializers.get(str(value.name))
    if known is not None:
        if _content(known) == _content(value):
            ir.convenience.replace_all_uses_with(value, known)
            return
        name = next(name for index in count(2) if (name := f"{value.name}_{index}") not in graph.initializers)
        value.name = name
    graph.initializers[str(value.name)] = value


def _content(value: ir.Value) -> tuple[object, ...]:
    """What a constant holds; of what is stored outside the graph, where."""
    tensor = value.const_value
    assert tensor is not None
    held = (tensor.location, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else tensor.tobytes()
    return tensor.dtype, tuple(tensor.shape), held
