"""From a graph to a network that is ready to be built, and its profiles; the same for both flavours of TensorRT.

The network comes from TensorRT's own ONNX parser, because its errors name node and operator; profiles go through Polygraphy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from polygraphy.backend.trt import Profile

from artifact.errors import EngineError
from engines.backends.bridge import Logger
from engines.backends.flavour import trt
from engines.backends.static_network import prepare_static
from engines.lengths import lengths_by_attention


def parse(graph: Path, builder: Any, logger: Logger) -> tuple[Any, Any]:
    """A network and its parser, which owns the weights and must outlive it.

    Raises:
        EngineError: with the node and the operator that TensorRT names.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = errors[0]
        where = f"node {first.node_name()!r} ({first.node_operator()})" if first.node() >= 0 else "the graph"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise EngineError(f"{graph.name}: TensorRT can't parse {where}: {first.desc()}{more}")
    return network, parser


def prepare(network: Any, graph: Path) -> dict[str, int]:
    """Put back what the parser drops of a graph, and count it; nothing is to be done for a dynamic cache.

    Raises:
        EngineError: attention that would ignore its lengths, or a cache that would not be updated in place.
    """
    nodes = ir.load(graph).graph
    lengths_of, n_caches = lengths_by_attention(nodes), sum(node.op_type == "TensorScatter" for node in nodes)
    if not lengths_of and not n_caches:  # releases before 11.0 have no lengths to ask for
        return {"attention_by_lengths": 0, "caches_in_place": 0}
    return prepare_static(network, lengths_of, n_caches)


def to_profiles(requested: Sequence[Mapping[str, Sequence[Sequence[int]]]]) -> list[Profile]:
    """Polygraphy's profiles of what a request holds: input → [minimum, optimum, maximum]."""
    profiles = []
    for shapes in requested:
        profile = Profile()
        for name, (minimum, optimum, maximum) in shapes.items():
            profile.add(name, min=tuple(minimum), opt=tuple(optimum), max=tuple(maximum))
        profiles.append(profile)
    return profiles
