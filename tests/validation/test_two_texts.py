"""Quality on two texts: each is judged, and a form that is right on one alone fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import cli
from artifact import io_spec
from artifact.errors import UsageError
from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from validation.parity import validate_artifact

pytestmark = pytest.mark.parity
Report = dict[str, Any]
RARE = 63


def write_words(path: Path, ids: np.ndarray) -> Path:
    path.write_text(" ".join(map(str, ids.tolist())))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One text of the lower ids, one of the upper, in which the last is rare."""
    folder, random = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    upper = random.integers(32, RARE, 1100)
    upper[40::80] = RARE
    return [write_words(folder / "low.txt", random.integers(0, 32, 1100)), write_words(folder / "high.txt", upper)]


@pytest.fixture(scope="module")
def measure(checkpoint: Checkpoint, texts: list[Path]) -> Callable[[Path], Report]:
    def run(artifact: Path) -> Report:
        return validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=["int8"], text=texts, tokens=2048)

    return run


@pytest.fixture(scope="module")
def sound(quantized: Path, measure: Callable[[Path], Report], tmp_path_factory: pytest.TempPathFactory) -> Report:
    return measure(Path(shutil.copytree(quantized, tmp_path_factory.mktemp("sound") / "tiny")))


def int8(report: Report) -> Report:
    found: Report = report["stages"][0]
    return found


def of(report: Report, text: str) -> Report:
    return next(scope for scope in int8(report)["quality"]["texts"] if scope["text"] == text)


def misread(first: int, last: int) -> Callable[[Any], None]:
    """An edit: ids from ``first`` on are read in reverse order, the first as ``last``; the others as they are."""

    def edit(editor: Any) -> None:
        ids = editor.input(io_spec.INPUT_IDS)

        def swapped() -> ir.Value:
            chosen = editor.cast(editor.op("Greater", ids, editor.number(first - 1)))
            mirrored = editor.op("Sub", editor.op("Sub", editor.number(first + last), ids), ids)
            return editor.op("Add", ids, editor.op("Mul", chosen, mirrored))

        editor.replace(ids, swapped)

    return edit


def test_every_text_is_in_the_report_and_holds(sound: Report) -> None:
    assert sound["passed"] is True
    assert sound["text"] | {"sha256": ""} == {
        "name": "low.txt, high.txt", "sha256": "", "scored_tokens": 2048, "kind": "text", "window": 96, "stride": 48, "bos": None,
    }  # fmt: skip
    assert [(text["name"], text["scored_tokens"]) for text in sound["texts"]] == [("low.txt", 1024), ("high.txt", 1024)]
    quality = int8(sound)["quality"]
    assert quality["all"]["mean_kl"] == int8(sound)["mean_kl"] == pytest.approx(np.mean([text["mean_kl"] for text in quality["texts"]]))
    assert quality["all"]["p99_kl"] > int8(sound)["mean_kl"]
    assert {entry["tokens"] for entry in quality["greedy"]} == {32}
    assert quality["all"]["against_float16"]["mean_kl"]["value"] > 0
    assert sound["float16"]["quality"]["all"]["mean_kl"] < int8(sound)["mean_kl"] / 10
    errors, own = int8(sound)["hidden_errors"], sound["float16"]["hidden_errors"]
    assert all(ours > theirs > 0 for ours, theirs in zip(errors, own, strict=True))


def test_saboteur_of_one_text_fails_and_the_text_is_named(
    quantized: Path, sound: Report, measure: Callable[[Path], Report], sabotage: Callable[..., Path], tmp_path: Path
) -> None:
    report = measure(sabotage(quantized, tmp_path / "tiny", "int8", misread(32, 63)))
    failed = {check["check"]: check["where"] for check in int8(report)["checks"] if check["passed"] is False}
    assert failed["mean_kl"] == "high.txt"
    assert of(report, "low.txt")["mean_kl"] == of(sound, "low.txt")["mean_kl"]  # what is right on the first text is left alone
    assert "high.txt" in report["headline"]


def test_saboteur_of_a_rare_token_shows_in_the_tail(
    quantized: Path, sound: Report, measure: Callable[[Path], Report], sabotage: Callable[..., Path], tmp_path: Path
) -> None:
    report = measure(sabotage(quantized, tmp_path / "tiny", "int8", misread(RARE, 0)))
    damaged, undamaged = of(report, "high.txt"), of(sound, "high.txt")
    assert damaged["p99_kl"] / undamaged["p99_kl"] > 2 * damaged["mean_kl"] / undamaged["mean_kl"]


def test_a_text_given_twice_is_refused(quantized: Path, checkpoint: Checkpoint, texts: list[Path]) -> None:
    with pytest.raises(UsageError, match=r"low\.txt is given twice") as caught:
        validate_artifact(StepContext(quantized), checkpoint=checkpoint, stages=["int8"], text=[texts[0], texts[0]], tokens=2048)
    assert "--text FILE" in str(caught.value.hint)


def test_the_option_repeats(quantized: Path, texts: list[Path], tmp_path: Path) -> None:
    artifact = shutil.copytree(quantized, tmp_path / "tiny")
    arguments = [
        "validate",
        str(artifact),
        "--stage",
        "int8",
        *(part for text in texts for part in ("--text", str(text))),
        "--tokens",
        "1024",
        "--json",
    ]
    result = CliRunner().invoke(cli.app, arguments)
    report = json.loads(result.stdout)
    assert [(text["name"], text["scored_tokens"]) for text in report["texts"]] == [("low.txt", 512), ("high.txt", 512)]
    assert report["headline"].startswith("structure proven for int8, quality not: too few tokens for the gate (1,024 of 2,048)")
