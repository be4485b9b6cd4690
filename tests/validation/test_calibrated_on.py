"""A text that a stage was calibrated on proves nothing of it, and the report says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifact.hashing import sha256_of
from validation.calibrated_on import calibrated_stages, mark, mark_all, why_no_proof
from validation.text import DEFAULT_TEXTS


def manifest(**stages: str | None) -> dict[str, Any]:
    """Stage → hash of what it was calibrated on; None: on nothing."""
    steps = {f"quantize-{stage}": {"report": {"calibration": {"text": "t.txt", "sha256": sha256}}} for stage, sha256 in stages.items() if sha256}
    return {"steps": {"fuse": {"report": {}}, "quantize-int4": {"report": {"calibration": {"text": None, "reason": "none"}}}, **steps}}


def test_names_the_stages_that_were_calibrated_on_each_text(tmp_path: Path) -> None:
    texts = [tmp_path / "one.txt", tmp_path / "other.txt"]
    for path in texts:
        path.write_text(path.name)
    found = calibrated_stages(manifest(int8=sha256_of(texts[1])), ["fused", "int8", "int4"], texts)
    assert found == [[], ["int8"]]
    assert calibrated_stages(manifest(int8=sha256_of(texts[1])), ["fused"], texts) == [[], []]  # a stage that is not measured


def test_the_committed_texts_are_compared_too() -> None:
    assert calibrated_stages(manifest(int8=sha256_of(DEFAULT_TEXTS[1])), ["int8"], None) == [[], ["int8"]]


def test_the_report_says_that_it_is_no_proof() -> None:
    texts = mark([{"name": "one.txt"}, {"name": "other.txt"}], "calibrated_stages", [[], ["int8", "int8-smoothquant"]])
    assert texts == [{"name": "one.txt"}, {"name": "other.txt", "calibrated_stages": ["int8", "int8-smoothquant"]}]
    assert why_no_proof(texts) == "int8, int8-smoothquant calibrated on other.txt, and perplexity there is no proof"
    assert why_no_proof(texts[:1]) is None


def test_ids_that_are_no_text_stay_as_they_are() -> None:
    assert mark([{"name": "random ids, seed 0"}], "placed_stages", [[], []]) == [{"name": "random ids, seed 0"}]


def test_a_stage_that_was_placed_on_a_text_is_marked_and_proven_on_another_alone() -> None:
    steps = {"quantize-int8-smoothquant": {"report": {"placement": {"text": "default.txt", "sha256": sha256_of(DEFAULT_TEXTS[0])}}}}
    texts = mark_all([{"name": path.name} for path in DEFAULT_TEXTS], {"steps": steps}, ["fused", "int8-smoothquant"], None)
    assert texts == [{"name": "default.txt", "placed_stages": ["int8-smoothquant"]}, {"name": "code.txt"}]
    assert why_no_proof(texts) is None
    assert why_no_proof(texts[:1]) == "int8-smoothquant placed on default.txt, and scored on no other text"
    assert why_no_proof([]) is None
