"""What each kernel of a plan does, and in which decoder layer: read from the plan's programs, beside the graph that it was built from.

A kernel says which ONNX nodes it computes, which constants it reads and what it writes; how large a result is follows from the program's own
arithmetic (``plan_shapes``). So keys and values that a kernel repeats for every query head, or copies for attention, are seen by their size. Only
what kind of arithmetic a kernel does comes from its name, in which TensorRT-RTX spells its operations: ``__myl_CastMulMeanAddSqrtDivMulCastMul``.

Letters: B batch, S new tokens, T past and new, H query heads, K kv heads, D head_dim, V vocab.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import onnx_ir as ir

from artifact.config import LlamaConfig
from artifact.io_spec import BATCH, CACHE_KINDS, LOGITS, SEQUENCE, TOTAL, past_name, present_name
from artifact.layout import MODULE_KEY, layer_of
from engines.graph_weights import layers_in, node_label
from engines.plan_kinds import ATTENTION, CACHE, CAST, COPIED, COPY, GEMM, NORM, POINTWISE, PRODUCT, REPEATED, ROTARY, SCORES, SOFTMAX, Description
from engines.plan_program import Kernel, Program, Tensor
from engines.plan_shapes import Dimension, Sizes

MOVES = frozenset(("Move", "Resh", "Tran", "Slic", "Spli", "Conc", "Repl"))
ROTATION = frozenset(("Mul", "Sub", "Add", "Conc"))
NORMALIZATION = "RMSNormalization"
LIBRARY = "fully_connected"
"""A GEMM of TensorRT's library, not a kernel of the compiler's own making."""
_OPERATION = re.compile(r"[A-Z][a-z0-9]*")
_NUMBERED = re.compile(r"(?:^|[./_])(?:layers|h|blocks)[./_](\d+)(?=[./_]|$)")


@dataclass(frozen=True)
class Launch:
    """A kernel, and what it does.

    Attributes:
        kernel: as the plan has it.
        layer: the decoder layer it belongs to; None outside.
        kind: see ``ATTENTION`` … ``POINTWISE``.
        weight: TensorRT's type of the weight that a GEMM reads: ``half``, ``int8``.
        writes: what of the cache, the logits and attention's inner values it writes, without the layer's number.
    """

    kernel: Kernel
    layer: int | None
    kind: str
    weight: str | None
    writes: tuple[str, ...]

    @property
    def multiplies_integers(self) -> bool:
        """Whether it is a GEMM of int8 by int8 whose sums leave it in float32: in float16 four products of full scale would overflow."""
        reads = {tensor.dtype for tensor in self.kernel.reads}
        return self.kind == GEMM and self.weight == "int8" and "int8" in reads and {tensor.dtype for tensor in self.kernel.writes} == {"float"}

    def as_json(self) -> Description:
        """One entry of a layer's kernels."""
        return {"kernel": self.kernel.name, "kind": self.kind, "weight": self.weight, "writes": list(self.writes)}


class PlanReader:
    """Reads the launches of a plan's programs.

    Args:
        graph: what the plan was built from; nodes carry their module path, or a name that holds ``layers.3``.
        config: its numbers of heads.
    """

    def __init__(self, graph: ir.Graph, config: LlamaConfig) -> None:
        nodes = [(node_label(node), node) for node in graph]
        inputs = {str(value.name): -1 for value in graph.inputs}  # a network layer that the build adds bears the name of the input that it reads
        self._place = inputs | {label: position for position, (label, _) in enumerate(nodes)}
        self._layer = {label: _layer(label, node) for label, node in nodes} | {str(value.name): None for value in graph.inputs}
        self._operator = {label: node.op_type for label, node in nodes}
        self._shapes = {str(value.name): _shape(value) for value in graph.inputs}
        self.layers = layers_in(graph)
        self.gives_logits = any(value.name == LOGITS for value in graph.outputs)
        self._presents = {present_name(i, kind): f"present {kind}" for i in self.layers for kind in CACHE_KINDS}
        self._config = config

    def sizes(self, program: Program) -> Sizes:
        """Sizes of the program's tensors, its inputs' axes being the graph's."""
        tensors = {tensor.interface: tensor for tensor in program.tensors.values()}
        return Sizes(program.instructions, [(shape, tensors[name].dims) for name, shape in self._shapes.items() if name in tensors])

    def launches(self, program: Program) -> list[Launch]:
        """What the program runs, in order.

        A kernel without a node of the graph belongs to the layer of the one before. What makes a mask before any weight is read belongs to none: all
        layers share it, and TensorRT names the first layer's attention for it.
        """
        sizes, logits = self.sizes(program), self._logits(program)
        found: list[Launch] = []
        started = False
        for kernel in program.kernels:
            started = started or any(constant.size_bytes > SCALAR_BYTES for constant in kernel.constants)
            shared = not started and self._makes_mask(kernel)
            layer = None if shared else self._layer_of(kernel, found[-1].layer if found else None)
            writes = tuple(sorted(self._roles(kernel, sizes, logits)))
            kind, weight = self._kind(kernel, writes)
            found.append(Launch(kernel, layer, kind, weight, writes))
        return found

    def logits_positions(self, program: Program) -> int | None:
        """Of how many positions a row the program gives logits; None where that can't be read."""
        sizes, logits = self.sizes(program), self._logits(program)
        found = sizes.elements(program.tensors[logits].dims) if logits is not None else None
        return found // (sizes.axes[BATCH] * self._config.vocab_size) if found is not None else None

    def _logits(self, program: Program) -> str | None:
        """The plan's name of the logits: the only output that is no cache; None of a part that gives a hidden state."""
        if not self.gives_logits:
            return None
        others = [name for name in program.outputs if name in program.tensors and program.tensors[name].interface not in self._presents]
        return others[0] if len(others) == 1 else None

    def _makes_mask(self, kernel: Kernel) -> bool:
        """Whether it computes a part of attention, and not attention itself."""
        return "mha" not in kernel.name and {self._operator[label] for label in kernel.layers if label in self._operator} == {"Attention"}

    def _layer_of(self, kernel: Kernel, before: int | None) -> int | None:
        """Where its norm is, or else most of its nodes; of two such places the one behind.

        What a layer ends with goes with the next one's norm: of a residual sum and the mean of its squares, in one kernel, more may be the sum's.
        """
        known = [label for label in kernel.layers if label in self._place]
        norms = [label for label in known if self._operator.get(label) == NORMALIZATION]
        if norms and "Mean" in _operations(kernel.name):
            known = norms
        if not known:
            return before
        votes = Counter(self._layer[label] for label in known)
        last = {self._layer[label]: self._place[label] for label in sorted(known, key=self._place.__getitem__)}
        return max(votes, key=lambda layer: (votes[layer], last[layer]))

    def _roles(self, kernel: Kernel, sizes: Sizes, logits: str | None) -> Iterator[str]:
        for tensor in kernel.writes:
            if tensor.interface in self._presents:
                yield self._presents[tensor.interface]
            elif tensor.name == logits:
                yield LOGITS
            else:
                yield from self._inner_role(tensor, sizes)

    def _inner_role(self, tensor: Tensor, sizes: Sizes) -> Iterator[str]:
        config, axes = self._config, sizes.axes
        total = self._slots() or axes[TOTAL]
        cached = axes[BATCH] * total * config.head_dim
        roles = {
            axes[BATCH] * config.num_attention_heads * axes[SEQUENCE] * total: SCORES,
            cached * config.num_attention_heads: REPEATED,
            cached * config.num_key_value_heads: COPIED,
        }
        elements = sizes.elements(tensor.dims)
        if elements in roles:
            yield roles[elements]

    def _slots(self) -> int | None:
        """The capacity of a static cache, which an engine graph holds as a number; None for a dynamic one, whose past may be of any length."""
        past = self._shapes.get(past_name(self.layers[0], CACHE_KINDS[0]), ()) if self.layers else ()
        slots = past[2] if len(past) > 2 else None
        return slots if isinstance(slots, int) else None

    def _kind(self, kernel: Kernel, writes: Sequence[str]) -> tuple[str, str | None]:
        """Kind, and the type of a GEMM's weight."""
        operations, nodes = _operations(kernel.name), {self._operator[label] for label in kernel.layers if label in self._operator}
        if "mha" in kernel.name:
            return ATTENTION, None
        if kernel.name == LIBRARY or "Fc" in operations or _is_dot_product(operations, nodes):
            weight = max((constant for constant in kernel.constants), key=lambda constant: constant.size_bytes, default=None)
            return (PRODUCT, None) if weight is None or weight.size_bytes <= SCALAR_BYTES else (GEMM, weight.dtype)
        if any(role in self._presents.values() for role in writes) or "TensorScatter" in nodes:
            return CACHE, None
        return _arithmetic(operations, nodes), None


SCALAR_BYTES = 16
"""A constant no larger is a factor, not a weight."""


def describe(launches: Sequence[Launch]) -> Description:
    """The launches of a profile by layer: neighbours that hold the same kernels stand together.

    Returns:
        ``layers``: [{first, last, kernels}], ``outside``: kernels before, between and behind the layers.
    """
    by_layer = [(layer, [launch.as_json() for launch in launches if launch.layer == layer]) for layer in layers_of(launches)]
    alike = [list(group) for _, group in groupby(by_layer, key=lambda item: item[1])]
    folded = [{"first": group[0][0], "last": group[-1][0], "kernels": group[0][1]} for group in alike]
    return {"layers": folded, "outside": [launch.as_json() for launch in launches if launch.layer is None]}


def layers_of(launches: Sequence[Launch]) -> list[int]:
    """The layers that have kernels, in order."""
    return sorted({launch.layer for launch in launches if launch.layer is not None})


def _arithmetic(operations: Sequence[str], nodes: set[str]) -> str:
    """Kind of a kernel that multiplies no matrices."""
    done = set(operations)
    if "Mean" in done:
        return NORM
    if "Exp" in done and "Sum" in done:
        return SOFTMAX
    if "RotaryEmbedding" in nodes or (done >= ROTATION and Counter(operations)["Mul"] >= len(ROTATION)):
        return ROTARY
    if done and done <= MOVES:
        return COPY
    return CAST if "Cast" in done and done <= MOVES | {"Cast"} else POINTWISE


def _is_dot_product(operations: Sequence[str], nodes: set[str]) -> bool:
    """A MatMul by one row is a sum of products, in a kernel of the compiler's own, or as the graph has it; a soft-max sums too, of exponentials."""
    return bool(nodes & {"MatMul", "Gemm", "ReduceSum"}) and "Sum" in operations and "Exp" not in operations


def _operations(name: str) -> list[str]:
    """``__myl_MoveReshTran`` → Move, Resh, Tran; a name that TensorRT cut off ends in Etc, which is no operation that only moves."""
    return _OPERATION.findall(name.removeprefix("__myl_")) if name.startswith("__myl_") else []


def _layer(label: str, node: ir.Node) -> int | None:
    layer = layer_of(node.metadata_props.get(MODULE_KEY))
    match = _NUMBERED.search(label) if layer is None and MODULE_KEY not in node.metadata_props else None
    return int(match[1]) if match else layer


def _shape(value: ir.Value) -> tuple[Dimension, ...]:
    dims: Sequence[Any] = list(value.shape or ())
    return tuple(dim if isinstance(dim, int) else str(dim.value) for dim in dims)
