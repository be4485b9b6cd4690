"""Calls at the edges of an engine's profiles: the least and the most that it admits of batch, new tokens and past.

Prompts of the maximum can't be computed here at full size, and need not: what depends on length is the mask, the rotary values, the positions and the
attention. So a long past is filled with the reference's own keys and values, again and again, given to the graph and to its trusted counterpart
alike, and few tokens are computed behind it. Every landmark of a layer is compared, not the logits alone.
Letters: B batch, S new tokens, P past, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from artifact import io_spec
from artifact.engine_names import built_from
from engines.edge_calls import LARGEST_CACHE, LONGEST_CALL, cache_bytes
from engines.profiles import DEFAULT_BATCH, default_length, make_profiles
from validation.bisect.probes import Probe
from validation.calls import FORMS, Turn
from validation.oracle import MAIN, Oracle

Axes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Edge:
    """One edge.

    Attributes:
        profile: ``decode``, ``prefill``.
        batch, new, past: rows, new tokens and cached tokens of each.
        reason: why it is not run here; None where it is.
    """

    profile: str
    batch: int
    new: int
    past: int
    reason: str | None = None

    @property
    def name(self) -> str:
        """``edge of decode: 4 rows, 1 token after 4095``."""
        rows, tokens = ("s" if count > 1 else "" for count in (self.batch, self.new))
        return f"edge of {self.profile}: {self.batch} row{rows}, {self.new} token{tokens}" + (f" after {self.past}" if self.past else "")


def profiles_of(oracle: Oracle, stage: str, engines: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Axes], str]:
    """The widest profiles that plans of a stage were built with, or those that ``build`` takes; and which of the two."""
    built = [engine["profiles"] for engine in engines if engine.get("profiles") and built_from(str(engine.get("graph", ""))) == stage]
    if built:
        return max(built, key=_reach), "build.json"
    form, length = oracle.kv_cache, default_length(oracle.config)
    made = make_profiles(oracle.config, oracle.dtype, form, max_batch=DEFAULT_BATCH, max_length=length)
    return {profile.name: profile.axes for profile in made}, "the default"


def edges_of(oracle: Oracle, profiles: Mapping[str, Axes]) -> list[Edge]:
    """Every edge of some profiles once: least and most rows, the least, the tuned and the most new tokens, no past and all."""
    found: dict[tuple[int, int, int], Edge] = {}
    for name, axes in sorted(profiles.items(), key=lambda item: item[1][io_spec.SEQUENCE][2]):  # a step is the decode profile's
        longest = _longest(axes)
        for batch in dict.fromkeys((axes[io_spec.BATCH][0], axes[io_spec.BATCH][2])):
            for new in dict.fromkeys(axes[io_spec.SEQUENCE]):
                for past in dict.fromkeys((0, longest - new)):
                    edge = Edge(name, batch, new, past)
                    found.setdefault((batch, new, past), replace(edge, reason=_too_big(oracle, edge)))
    return list(found.values())


def edge_probe(oracle: Oracle, edge: Edge) -> Probe:
    """The call of an edge; its rows are of the main sequence, its tokens and its past repeated as often as it takes."""
    row = next(scenario.rows[0] for scenario in oracle.scenarios)
    tokens = np.resize(row, edge.past + edge.new)
    turns = [Turn((tokens[: edge.past],) * edge.batch, (0,) * edge.batch)] if edge.past else []
    turns.append(Turn((tokens[edge.past :],) * edge.batch, (edge.past,) * edge.batch))
    call = list(FORMS[oracle.kv_cache].calls(turns))[-1]
    slots = edge.past + edge.new if oracle.kv_cache == "static" else 0
    return Probe(edge.name, (MAIN,) * edge.batch, turns[-1], call, slots)


def _reach(profiles: Mapping[str, Axes]) -> tuple[int, int]:
    return max(_longest(axes) for axes in profiles.values()), max(axes[io_spec.BATCH][2] for axes in profiles.values())


def _longest(axes: Axes) -> int:
    return int(axes[io_spec.TOTAL][2] if io_spec.TOTAL in axes else axes[io_spec.CAPACITY][2])


def _too_big(oracle: Oracle, edge: Edge) -> str | None:
    size = cache_bytes(oracle.config, edge.batch, edge.past + edge.new)
    if edge.batch * edge.new > LONGEST_CALL:
        return f"{edge.batch * edge.new:,} new tokens a call are too many for a CPU ({LONGEST_CALL} at most); edges with past meet its length"
    return f"its keys and values take {size / 1e9:.1f} GB a layer ({LARGEST_CACHE / 1e9:.1f} at most)" if size > LARGEST_CACHE else None
