"""Cut a whole graph into its pieces, and prove that the pieces, joined by name, are the graph again.

    shared ─▶ layer 0 ─▶ layer 1 ─▶ … ─▶ layer N-1 ─▶ tail        an output of one cut is the input of that name of a later one

The proof is by digests (``graphs.diff``): what leaves a cut carries the digest of how it was computed into the next, so the joined cuts have the
graph's own digests at every output exactly where no node, edge, attribute or weight was lost, changed or added.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import onnx_ir as ir

from graphs.diff import GraphDifference, describe_node, external_places, graph_digests, moved_weights
from graphs.partition import cut_layer, cut_shared, cut_tail, layer_count, part_boundaries


@dataclass(frozen=True)
class Cuts:
    """A graph in pieces.

    Attributes:
        whole: the graph that was cut, its boundaries parted.
        parted: residual sums that were parted from the norm of the next layer first (``partition.part_boundaries``).
        shared, layers, tail: the pieces, in the order in which they run.
    """

    whole: ir.Model = field(repr=False)
    parted: int
    shared: ir.Model = field(repr=False)
    layers: tuple[ir.Model, ...] = field(repr=False)
    tail: ir.Model = field(repr=False)

    @property
    def all(self) -> tuple[ir.Model, ...]:
        """Every piece, in order."""
        return (self.shared, *self.layers, self.tail)


def cut_graph(model: ir.Model) -> Cuts:
    """Cut a graph at its layers; the model itself changes only where boundaries had to be parted.

    Raises:
        FusionError: it can't be cut; what was found is named.
    """
    parted = part_boundaries(model)
    layers = tuple(cut_layer(model, layer) for layer in range(layer_count(model)))
    return Cuts(model, parted, cut_shared(model), layers, cut_tail(model))


def joined_difference(cuts: Cuts) -> tuple[GraphDifference, list[str]]:
    """What the joined cuts and the whole graph do not share, and the weights that a cut reads from another place; nothing where they are the same."""
    whole = graph_digests(cuts.whole.graph)
    joined = join_digests(cuts)
    expected = {str(value.name): whole[value] for value in cuts.whole.graph.outputs}
    given = {str(value.name): joined[value] for cut in cuts.all for value in cut.graph.outputs if value.name in expected}
    outputs = [name for name in expected if given.get(name) != expected[name]]
    ours, theirs = set(joined.values()), set(whole.values())
    only_whole = [describe_node(node) for node in cuts.whole.graph if not ours.issuperset(whole[value] for value in node.outputs)]
    only_cuts = [describe_node(node) for cut in cuts.all for node in cut.graph if not theirs.issuperset(joined[value] for value in node.outputs)]
    moved = dict.fromkeys(name for cut in cuts.all for name in moved_weights(cut.graph, cuts.whole.graph) if name in cut.graph.initializers)
    return GraphDifference(outputs, only_whole, only_cuts), list(moved)


def body_key(cuts: Cuts) -> str:
    """A hash of everything up to the last hidden state and all caches: operators, edges and the places of the weights.

    Two graphs with the same key compute the same in front of their tails.
    """
    joined = join_digests(cuts)
    body = cuts.all[:-1]
    made = [f"{value.name} {joined[value]}" for cut in body for value in cut.graph.outputs]
    read = [f"{name} {place}" for cut in body for name, place in sorted(external_places(cut.graph).items())]
    return hashlib.sha256("\n".join([*made, *read]).encode()).hexdigest()


def join_digests(cuts: Cuts) -> dict[ir.Value, str]:
    """Digest of every value of every cut, as the cuts before it compute what it reads."""
    made: dict[str, str] = {}
    digests: dict[ir.Value, str] = {}
    for cut in cuts.all:
        of_cut = graph_digests(cut.graph, entering=made)
        made |= {str(value.name): of_cut[value] for value in cut.graph.outputs}
        digests |= of_cut
    return digests
