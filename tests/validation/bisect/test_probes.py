"""Caches of a probe: the reference's keys and values at the columns that the contract gives them, whatever the form, the row and the length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifact import io_spec
from artifact.io_spec import KvCache
from exporter.checkpoints import Checkpoint
from validation.bisect.edges import Edge, edge_probe
from validation.bisect.probes import UNWRITTEN, Probe, make_probes
from validation.oracle import Oracle


def expected(oracle: Oracle, probe: Probe, row: int, kind: str) -> tuple[Any, Any]:
    """[K, P, D] as the reference left them, repeated where the past is longer; and what stands where nothing is."""
    run, past = oracle.runs[probe.sequences[row]], probe.turn.past[row]
    kept = np.asarray((run.keys if kind == "key" else run.values)[0])
    columns = [kept[:, index % kept.shape[1]] for index in range(past)]
    return (np.stack(columns, axis=1) if columns else kept[:, :0]), UNWRITTEN if probe.slots else kept[:, :1]


@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_every_row_has_its_own_past_and_nothing_else(
    form: KvCache, three_layers: Checkpoint, stages: Path, static_stages: Path, oracle_of: Callable[..., Oracle]
) -> None:
    oracle = oracle_of(three_layers, static_stages if form == "static" else stages, form)
    length = int(oracle.capacity) if form == "static" else 200
    probes = [*make_probes(oracle), edge_probe(oracle, Edge("decode", 3, 1, length - 1))]
    assert max(past for probe in probes for past in probe.turn.past) > len(oracle.runs[0].keys[0][0]) or form == "static"
    for probe in probes:
        caches = probe.caches(oracle, 0)
        for kind in io_spec.CACHE_KINDS:
            found = caches[io_spec.past_name(0, kind)]
            assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
            for row, past in enumerate(probe.turn.past):
                real, filler = expected(oracle, probe, row, kind)
                start = found.shape[2] - past if form == "dynamic" else 0
                ours = found[row, :, start : start + past]
                rest = np.delete(found[row], np.arange(start, start + past), axis=1)
                assert np.array_equal(ours, real.astype(np.float32))
                assert np.array_equal(rest, np.broadcast_to(np.float32(filler), rest.shape))
