"""Graphs that are right in all four scenarios and wrong at the most that their plans admit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifact import io_spec
from artifact.steps import StepContext, run_step
from engines.edge_calls import LARGEST_CACHE
from exporter.checkpoints import Checkpoint, open_checkpoint
from exporter.export import export_checkpoint
from validation.bisect import edges
from validation.bisect.edge_report import measure_edges
from validation.bisect.edges import edges_of, profiles_of
from validation.floor import no_floor
from validation.manner import Manner
from validation.oracle import Oracle
from validation.parity import validate_artifact
from validation.prepare import prepare_oracle

pytestmark = pytest.mark.parity
MAXIMUM = 512


@pytest.fixture(scope="module")
def long(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A model whose positions go beyond the 320 of the scenarios, exported."""
    shape = {"max_position_embeddings": MAXIMUM, "num_hidden_layers": 2}
    checkpoint = open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "long", **shape)))
    artifact = tmp_path_factory.mktemp("artifact") / "long"
    run_step(artifact, "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp16"))
    return checkpoint, artifact


@pytest.fixture(scope="module")
def oracle(long: tuple[Checkpoint, Path]) -> Oracle:
    checkpoint, artifact = long
    return prepare_oracle(StepContext(artifact), checkpoint, "fp16", text=None, tokens=None, measure=lambda *_: no_floor("not measured"))


def _entry() -> dict[str, Any]:
    return {"stage": "traced", "checks": [], "warnings": [], "passed": True, "seconds_by_part": {}}


def _clamp_positions(editor: Any) -> None:
    """A rotary cache that is too short by one: the last position is taken for the one before."""
    positions = editor.input(io_spec.POSITION_IDS)
    editor.replace(positions, lambda: editor.op("Min", positions, editor.number(MAXIMUM - 2)))


def _forget_far_columns(editor: Any) -> None:
    """A mask that was built for a fixed length: columns from 500 on are seen by nobody."""
    mask = next(node for node in editor.graph if node.op_type == "Or").outputs[0]
    columns = next(node for node in editor.graph if node.name == "model.Range").outputs[0]
    editor.replace(mask, lambda: editor.op("And", mask, editor.op("Less", columns, editor.number(500))))


def test_a_rotary_cache_too_short_by_one_is_caught_by_an_edge_alone_and_narrowed(
    long: tuple[Checkpoint, Path], sabotage: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint, sound = long
    artifact = sabotage(sound, tmp_path / "long", "traced", _clamp_positions)
    report = validate_artifact(
        StepContext(artifact), checkpoint=checkpoint, stages=None, text=None, tokens=None, manner=Manner(edges=True, bisect=True)
    )
    (stage,) = report["stages"]
    failed = [check for check in stage["checks"] if check["passed"] is False]
    assert [check["check"] for check in failed] == ["edge_faults", "narrowed_faults"]  # none of the four scenarios, no local ratio
    assert failed[0]["where"] == "edge of decode: 1 row, 1 token after 511"
    assert report["passed"] is False
    assert stage["bisect"]["found"]["op"] == "Min"
    assert stage["bisect"]["found"]["call"] == "edge of decode: 1 row, 1 token after 511"
    assert "edge of decode: 1 row, 1 token after 511" in (artifact / "reports/parity.md").read_text()


def test_a_sound_stage_holds_at_every_edge_and_names_what_is_too_big_to_run(long: tuple[Checkpoint, Path], oracle: Oracle) -> None:
    (stage,) = measure_edges(StepContext(long[1]), oracle, [_entry()], [])
    assert stage["edges"]["profiles"] == "the default"
    sizes = {(edge["batch"], edge["new_tokens"], edge["past"]): edge for edge in stage["edges"]["of"]}
    assert set(sizes) == {(rows, *rest) for rows in (1, 4) for rest in ((1, 0), (1, 511), (512, 0))}
    big = sizes.pop((4, 512, 0))
    assert {edge["passed"] for edge in sizes.values()} == {True}
    assert all(edge["tensors"] > 20 for edge in sizes.values())
    assert (stage["passed"], stage["checks"][-1]["passed"]) == (True, True)
    assert stage["checks"][-1]["reason"].startswith("5 of 6 edges were run; ")
    assert big["passed"] is None
    assert big["reason"] == "2,048 new tokens a call are too many for a CPU (512 at most); edges with past meet its length"
    assert stage["warnings"] == [f"not run, edge of prefill: 4 rows, 512 tokens: {big['reason']}"]


def test_caches_that_are_too_large_are_not_run(oracle: Oracle) -> None:
    rows, config = 400, oracle.config
    longest = LARGEST_CACHE // (2 * 4 * rows * config.num_key_value_heads * config.head_dim) + 1
    axes = {io_spec.BATCH: (rows, rows, rows), io_spec.SEQUENCE: (1, 1, 1), io_spec.TOTAL: (1, 1, longest)}
    assert [edge.reason for edge in edges_of(oracle, {"decode": axes}) if edge.past] == ["its keys and values take 0.5 GB a layer (0.5 at most)"]


def test_where_no_edge_can_be_run_nothing_is_judged(long: tuple[Checkpoint, Path], oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "LONGEST_CALL", 0)
    (stage,) = measure_edges(StepContext(long[1]), oracle, [_entry()], [])
    check = stage["checks"][-1]
    assert (check["value"], check["passed"]) == (None, None)
    assert "not judged: no edge is small enough to be run here" in check["reason"]


def test_a_mask_for_a_fixed_length_fails_where_it_ends(
    long: tuple[Checkpoint, Path], oracle: Oracle, sabotage: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "artifact", sabotage(long[1], tmp_path / "long", "traced", _forget_far_columns))
    (stage,) = measure_edges(StepContext(oracle.artifact), oracle, [_entry()], [])
    failed = [(edge["batch"], edge["new_tokens"], edge["past"]) for edge in stage["edges"]["of"] if edge["passed"] is False]
    assert failed == [(1, 1, 511), (4, 1, 511), (1, 512, 0)]
    assert stage["passed"] is False


def test_a_cache_index_that_is_clamped_fails_in_the_last_slot(
    static_stages: Path, three_layers: Checkpoint, sabotage: Callable[..., Path], tmp_path: Path
) -> None:
    def clamp(editor: Any) -> None:
        index = editor.input(io_spec.CACHE_WRITE_INDICES)
        editor.replace(index, lambda: editor.op("Min", index, editor.number(94)))

    artifact = sabotage(static_stages, tmp_path / "static", "fused", clamp)
    oracle = prepare_oracle(StepContext(artifact), three_layers, "fp16", "static", text=None, tokens=None, measure=lambda *_: no_floor("no"))
    (stage,) = measure_edges(StepContext(artifact), oracle, [_entry() | {"stage": "fused"}], [])
    failed = [(edge["batch"], edge["new_tokens"], edge["past"]) for edge in stage["edges"]["of"] if edge["passed"] is False]
    assert failed == [(1, 1, 95), (4, 1, 95)]


def test_the_widest_profiles_that_were_built_say_where_the_edges_are(oracle: Oracle) -> None:
    def engine(graph: str, length: int) -> dict[str, Any]:
        axes = {io_spec.BATCH: [1, 1, 2], io_spec.SEQUENCE: [1, 1, 1], io_spec.PAST: [0, 63, length - 1], io_spec.TOTAL: [1, 64, length]}
        return json.loads(json.dumps({"graph": graph, "profiles": {"decode": axes}}))

    built = [engine("traced-engine.onnx", 128), engine("traced-engine.onnx", 256), engine("fused-engine.onnx", 400)]
    profiles, source = profiles_of(oracle, "traced", built)
    assert source == "build.json"
    assert [(edge.batch, edge.new, edge.past) for edge in edges_of(oracle, profiles)] == [(1, 1, 0), (1, 1, 255), (2, 1, 0), (2, 1, 255)]
    assert profiles_of(oracle, "int8", built)[1] == "the default"
