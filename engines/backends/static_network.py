"""What a parsed TensorRT network still lacks for a static cache, and the proof that nothing was missed.

The ONNX parser leaves out the lengths of ``Attention`` (engines/lengths.py). Here each such layer gets them: a causal mask aligned to the lower right
of the slots in use, and the lengths as int32. Afterwards the network is read again: a layer without lengths is refused, and so is a cache that is not
updated in place, from a network input to a network output, which TensorRT then binds to one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from artifact.errors import EngineError
from engines.backends.flavour import trt


def prepare_static(network: Any, lengths_of: Mapping[str, str], n_caches: int) -> dict[str, int]:
    """Give lengths to the attention layers that a graph masks by them, and check that all have them.

    Args:
        network: as the parser made it; changed in place.
        lengths_of: name of each such node → the network input that holds its lengths, int64 [B].
        n_caches: TensorScatter nodes of the graph.

    Returns:
        ``attention_by_lengths`` and ``caches_in_place``: how many layers of each kind there are.

    Raises:
        EngineError: the network has another number of either than the graph.
    """
    give_lengths(network, lengths_of)
    return check_static(network, lengths_of, n_caches)


def give_lengths(network: Any, lengths_of: Mapping[str, str]) -> None:
    """Align the mask of each named attention to its lengths."""
    inputs = {tensor.name: tensor for tensor in (network.get_input(i) for i in range(network.num_inputs))}
    casts = {name: _as_int32(network, inputs[name]) for name in sorted(set(lengths_of.values()))}
    for attention in list(attentions(network)):
        if attention.name in lengths_of:
            attention.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
            attention.key_value_lengths = casts[lengths_of[attention.name]]


def _as_int32(network: Any, tensor: Any) -> Any:
    """A cast of a network input; a plan names it by that input, as it names other layers by their ONNX node."""
    cast = network.add_cast(tensor, trt.int32)
    cast.name = f"{tensor.name} as int32"
    cast.metadata = f"[ONNX Layer: {tensor.name}]"
    return cast.get_output(0)


def check_static(network: Any, lengths_of: Mapping[str, str], n_caches: int) -> dict[str, int]:
    """Count what stands in the network, and hold it against the graph; arguments, result and errors as in ``prepare_static``."""
    masked = {one.name for one in attentions(network) if one.causal_kind == trt.CausalMaskKind.LOWER_RIGHT and one.key_value_lengths is not None}
    missing = [name for name in lengths_of if name not in masked]
    if missing or len(masked) != len(lengths_of):
        where = f": {missing[0]!r} lacks them" if missing else ""
        raise EngineError(
            f"{len(masked)} attention layers of the network are masked by lengths, {len(lengths_of)} of the graph{where}; "
            "without lengths an engine attends to the wrong slots and says nothing"
        )
    in_place = sum(_is_in_place(layer) for layer in _layers(network, trt.LayerType.KV_CACHE_UPDATE))
    if in_place != n_caches:
        raise EngineError(f"TensorRT updates {in_place} caches in place, from a network input to a network output; the graph has {n_caches}")
    return {"attention_by_lengths": len(masked), "caches_in_place": in_place}


def attentions(network: Any) -> Iterator[Any]:
    """The attention of each attention layer; it bears the ONNX node's name."""
    for layer in _layers(network, trt.LayerType.ATTENTION_INPUT):
        layer.__class__ = trt.IAttentionInputLayer
        yield layer.attention


def _layers(network: Any, kind: Any) -> Iterator[Any]:
    return (layer for layer in (network.get_layer(i) for i in range(network.num_layers)) if layer.type == kind)


def _is_in_place(layer: Any) -> bool:
    return bool(layer.get_input(0).is_network_input and layer.get_output(0).is_network_output)
