"""Faults of a static cache, each as a bug in the step that made the graph: found, and named by the part that it is in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact import io_spec

pytestmark = pytest.mark.parity
Report = dict[str, Any]
Edit = Callable[[Any], None]
Sabotage = Callable[[Path, Path, str, Edit], Path]
Measure = Callable[[Path, str], tuple[Report, dict[str, str | None]]]
STAGES = ("traced", "fused", "int8")


def shift(editor: Any, name: str, by: int) -> None:
    """Add to an input [B] in calls of one token."""
    value = editor.input(name)
    editor.replace(value, lambda: editor.op("Add", value, editor.op("Mul", editor.single(), editor.number(by))))


def write_one_too_early(editor: Any) -> None:
    shift(editor, io_spec.CACHE_WRITE_INDICES, -1)


def write_one_too_late(editor: Any) -> None:
    shift(editor, io_spec.CACHE_WRITE_INDICES, 1)


def read_one_slot_too_many(editor: Any) -> None:
    shift(editor, io_spec.KEY_VALUE_LENGTHS, 1)


def miss_the_newest_token(editor: Any) -> None:
    """The lengths are one too small where S = 1, and nothing beside them allows a token's own slot."""
    for both in [node for node in editor.graph if node.op_type == "Or"]:
        both.outputs[0].replace_all_uses_with(both.inputs[0])
    shift(editor, io_spec.KEY_VALUE_LENGTHS, -1)


def mask_from_the_upper_left(editor: Any) -> None:
    """Causal as without a cache: what TensorRT makes of the graph when the lengths are dropped. Right in prefill."""
    lengths, ids = editor.input(io_spec.KEY_VALUE_LENGTHS), editor.input(io_spec.INPUT_IDS)
    editor.replace(lengths, lambda: editor.op("Expand", editor.op("Shape", ids, start=1, end=2), editor.op("Shape", lengths)))


def swap_caches_read(editor: Any) -> None:
    """Layer 0 reads layer 1's keys and the other way round."""
    first, second = (editor.input(io_spec.past_name(layer, "key")) for layer in (0, 1))
    users = [list(value.uses()) for value in (first, second)]
    for value, its_users in zip((second, first), users, strict=True):
        for node, index in its_users:
            node.replace_input_with(index, value)


def swap_caches_throughout(editor: Any) -> None:
    """Layer 0's keys go through layer 1's cache, in and out: every logit is right."""
    swap_caches_read(editor)
    outputs = {value.name: value for value in editor.graph.outputs}
    first, second = (outputs[io_spec.present_name(layer, "key")] for layer in (0, 1))
    first.name, second.name = second.name, first.name
    where = [list(editor.graph.outputs).index(value) for value in (first, second)]
    editor.graph.outputs[where[0]], editor.graph.outputs[where[1]] = second, first


def write_behind_the_padding(editor: Any) -> None:
    """Every row writes behind the longest one where S = 1: padding is not overwritten, and is read as if it were tokens."""
    for name in (io_spec.CACHE_WRITE_INDICES, io_spec.KEY_VALUE_LENGTHS):
        value = editor.input(name)
        editor.replace(value, lambda value=value: editor.op("Add", value, editor.op("Mul", editor.single(), _behind_longest(editor, value))))


def _behind_longest(editor: Any, value: ir.Value) -> ir.Value:
    return editor.op("Sub", editor.op("ReduceMax", value, keepdims=1), value)


NAMED = {
    write_one_too_early: "decode, steps",
    write_one_too_late: "decode, steps",
    read_one_slot_too_many: "decode, steps",
    miss_the_newest_token: "padded, row 1, steps",
    mask_from_the_upper_left: "padded, row 0, steps",
    swap_caches_read: "decode, steps",
    write_behind_the_padding: "padded, row 1, steps",
}
"""Fault → the part that is furthest from the graph's own logits for the row alone."""
STRAY = {
    write_one_too_late: "decode, row 0: present.0.key slot 96 has changed",
    write_behind_the_padding: "padded, row 1: present.0.key slot 48 has changed",
}
"""Fault → the first slot that no token of the row has and that is not as it was; the others write within their own."""
MASKED = (read_one_slot_too_many, miss_the_newest_token, mask_from_the_upper_left)
"""Faults of what is attended to, which a mask says in the traced graph and lengths in the others."""
SMALLEST = (miss_the_newest_token, write_behind_the_padding)
"""Faults that int8, with gates of its own, is tried with: those that move the logits least."""
CASES = [(edit, "fused") for edit in NAMED] + [(edit, "traced") for edit in MASKED] + [(edit, "int8") for edit in SMALLEST]


@pytest.mark.parametrize("stage", STAGES)
def test_undamaged_static_stages_pass_in_every_part(stage: str, static_artifact: Path, sabotage: Sabotage, measure: Measure, tmp_path: Path) -> None:
    report, failed = measure(sabotage(static_artifact, tmp_path / "tiny", stage, lambda editor: None), stage)
    assert failed == {}
    assert report["passed"] is True
    assert report["cache"] == {"form": "static", "capacity": 104}
    parts = [part["where"] for entry in report["stages"][0]["scenarios"] for part in entry["parts"]]
    padded = [f"padded, row {row}, {part}" for row in (0, 1) for part in ("prompt", "steps")]
    assert parts == ["prefill, prompt", "decode, prompt", "decode, steps", "chunked, prompt", "chunked, chunk 2", "chunked, chunk 3", *padded]
    judged = {check["check"]: check["passed"] for check in report["stages"][0]["checks"]}
    unjudged = {"perplexity_increase_pct"} if stage == "int8" else set()  # random ids are no text
    assert {check for check, passed in judged.items() if passed is None} == unjudged
    assert judged["stray_slots"] is True


@pytest.mark.parametrize(("edit", "stage"), CASES, ids=[f"{edit.__name__}-{stage}" for edit, stage in CASES])
def test_a_fault_of_the_static_cache_is_named(
    edit: Edit, stage: str, static_artifact: Path, sabotage: Sabotage, measure: Measure, tmp_path: Path
) -> None:
    report, failed = measure(sabotage(static_artifact, tmp_path / "tiny", stage, edit), stage)
    assert report["checksums"]["passed"] is True
    assert report["passed"] is False
    assert report["headline"].startswith(f"{stage} does not match")
    assert failed["self_consistency"] == NAMED[edit]
    assert failed.keys() & {"part_noise_ratio", "scenario_spread"}
    assert failed.get("stray_slots") == STRAY.get(edit)


def test_caches_of_two_layers_swapped_throughout_are_seen_in_the_caches_alone(
    static_artifact: Path, sabotage: Sabotage, measure: Measure, tmp_path: Path
) -> None:
    _, failed = measure(sabotage(static_artifact, tmp_path / "tiny", "fused", swap_caches_throughout), "fused")
    assert failed == {"cache_error": "layer 1 keys, padded"}
