"""A text that a stage was calibrated on proves nothing of it, and the report says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifact.hashing import sha256_of
from validation.calibrated_on import calibrated_stages, mark, why_no_proof
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


def test_a_text_that_linears_were_placed_on_is_no_proof_either() -> None:
    steps = {"quantize-int8": {"report": {"calibration": {"sha256": "other"}, "placement": {"sha256": sha256_of(DEFAULT_TEXTS[0])}}}}
    assert calibrated_stages({"steps": steps}, ["int8"], None) == [["int8"], []]


def test_the_committed_texts_are_compared_too() -> None:
    assert calibrated_stages(manifest(int8=sha256_of(DEFAULT_TEXTS[1])), ["int8"], None) == [[], ["int8"]]


def test_the_report_says_that_it_is_no_proof() -> None:
    texts = mark([{"name": "one.txt"}, {"name": "other.txt"}], [[], ["int8", "int8-smoothquant"]])
    assert texts == [{"name": "one.txt"}, {"name": "other.txt", "calibrated_stages": ["int8", "int8-smoothquant"]}]
    assert why_no_proof(texts) == "int8, int8-smoothquant calibrated or placed on other.txt, and perplexity there is no proof"
    assert why_no_proof(texts[:1]) is None


def test_ids_that_are_no_text_stay_as_they_are() -> None:
    assert mark([{"name": "random ids, seed 0"}], [[], []]) == [{"name": "random ids, seed 0"}]
