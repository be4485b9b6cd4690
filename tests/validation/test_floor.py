from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from artifact.manifest import read_manifest, write_manifest
from artifact.steps import ROOT, StepContext
from exporter.checkpoints import Checkpoint
from validation import floor as floors
from validation.floor import FILE, Float32Products, Floor, compare, measure_floor, streamed_logits, transformers_logits
from validation.reference import Reference, ReferenceRun

SEQUENCES = [np.arange(3, 63), np.arange(20, 50)]


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return Reference(checkpoint.config, checkpoint.read)


def test_floor_is_the_error_of_the_main_sequence(checkpoint: Checkpoint, reference: Reference, tmp_path: Path) -> None:
    runs = reference.run(SEQUENCES)
    floor = measure_floor(StepContext(tmp_path), "abc", reference, SEQUENCES, runs)
    half = transformers_logits(checkpoint.config, checkpoint.read, SEQUENCES)[0]
    error = np.abs(half - runs[0].logits())
    assert floor.mean_abs == pytest.approx(error.mean())
    assert floor.max_abs == error.max()
    assert floor.position_max[0] == error.max(axis=1).tolist()
    assert floor.noise(1, np.array([2, 5])) is not None
    assert floor.mean_at(0, np.array([2, 5])) == pytest.approx(error[[2, 5]].mean())
    assert 1e-5 < error.mean() < 1e-2
    assert "transformers" in floor.source


def test_floor_is_measured_once_for_a_checkpoint_and_tokens(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, step = reference.run(SEQUENCES), StepContext(tmp_path)
    calls: list[int] = []

    def counted(config: object, read: object, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        calls.append(len(sequences))
        return [run.logits() for run in runs]

    monkeypatch.setattr(floors, "transformers_logits", counted)
    first = recorded_floor(step, "abc", reference, runs)
    assert measure_floor(StepContext(tmp_path), "abc", reference, SEQUENCES, runs) == first
    assert calls == [2]
    measure_floor(step, "another checkpoint", reference, SEQUENCES, runs)
    measure_floor(step, "another checkpoint", reference, [SEQUENCES[0] + 1, SEQUENCES[1]], runs)
    assert calls == [2, 2, 2]
    (tmp_path / FILE).write_text("{")
    measure_floor(step, "abc", reference, SEQUENCES, runs)
    assert len(calls) == 4
    assert json.loads((tmp_path / FILE).read_text())["key"]["checkpoint"] == "abc"
    assert FILE in step.outputs


def recorded_floor(step: StepContext, fingerprint: str, reference: Reference, runs: list[ReferenceRun]) -> Floor:
    """Measured and recorded in the manifest, as a ``validate`` that came to its end does."""
    floor = measure_floor(step, fingerprint, reference, SEQUENCES, runs)
    manifest = read_manifest(step.artifact)
    manifest["steps"]["validate"] = {"outputs": dict(step.outputs)}
    write_manifest(step.artifact, manifest)
    return floor


def test_a_kept_floor_that_was_changed_is_measured_again(reference: Reference, tmp_path: Path) -> None:
    runs = reference.run(SEQUENCES)
    floor = recorded_floor(StepContext(tmp_path), "abc", reference, runs)
    kept = json.loads((tmp_path / FILE).read_text())
    kept["floor"]["mean_abs"] *= 1000
    (tmp_path / FILE).write_text(json.dumps(kept, indent=1) + "\n")
    assert measure_floor(StepContext(tmp_path), "abc", reference, SEQUENCES, runs) == floor


def test_a_kept_floor_that_no_step_recorded_is_measured_again(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = reference.run(SEQUENCES)
    measure_floor(StepContext(tmp_path), "abc", reference, SEQUENCES, runs)
    monkeypatch.setattr(floors, "transformers_logits", lambda *_: [run.logits() for run in runs])
    assert measure_floor(StepContext(tmp_path), "abc", reference, SEQUENCES, runs).mean_abs == 0


def test_a_floor_is_measured_again_when_our_own_rules_change(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = reference.run(SEQUENCES)
    recorded_floor(StepContext(tmp_path), "abc", reference, runs)
    assert {"validation/reference.py", "exporter/model.py", "exporter/rope.py"} < set(floors.RULES)
    assert all((ROOT / file).is_file() for file in floors.RULES)
    monkeypatch.setattr(floors, "rules_hash", lambda _: "other rules")
    monkeypatch.setattr(floors, "transformers_logits", lambda *_: [run.logits() for run in runs])
    assert measure_floor(StepContext(tmp_path), "abc", reference, SEQUENCES, runs).mean_abs == 0


def test_a_floor_that_is_not_finite_is_null_and_named() -> None:
    logits = np.ones((3, 4), np.float32)
    overflowed = logits.copy()
    overflowed[1, 2] = np.inf
    floor = compare([overflowed], [logits], "transformers")
    assert floor.mean_abs is None
    assert floor.noise(0, np.array([0])) is None
    assert floor.reason == "float16 logits are not finite from position 1 of sequence 0 on: the model overflows float16"


def test_the_reference_is_compared_with_transformers_alone(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = reference.run(SEQUENCES)
    floor = measure_floor(StepContext(tmp_path), "abc", reference, SEQUENCES, runs)
    assert floor.mean_kl is not None
    assert floor.as_report()["mean_kl"] == floor.mean_kl < 1e-5
    monkeypatch.setattr(floors, "STREAMED_ABOVE", 0)
    streamed = measure_floor(StepContext(tmp_path), "abc", reference, SEQUENCES, runs)
    assert streamed.mean_abs is not None
    assert streamed.mean_kl is None


def test_the_streamed_floor_is_that_of_transformers_within_its_tolerance(checkpoint: Checkpoint, reference: Reference) -> None:
    runs = reference.run(SEQUENCES)
    theirs = compare(transformers_logits(checkpoint.config, checkpoint.read, SEQUENCES), [run.logits() for run in runs], "transformers")
    ours = compare(streamed_logits(reference, SEQUENCES), [run.logits() for run in runs], "streamed")
    assert ours.mean_abs == pytest.approx(theirs.mean_abs, rel=0.2)


def test_float32_products_round_the_product_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 300, generator=generator).half(), torch.randn(7, 300, generator=generator).half()
    exact = x.double() @ weight.double().T
    with Float32Products():
        linear, product = torch.nn.functional.linear(x, weight), x @ weight.T
    assert linear.dtype == product.dtype == torch.float16
    assert torch.equal(linear, exact.half())
    assert torch.equal(product, exact.half())


def test_a_floor_that_is_not_there_or_zero_measures_nothing() -> None:
    positions = np.array([0])
    absent, zero = floors.no_floor("because"), Floor(0.0, 0.0, [[0.0]], [[0.0]], "x")
    assert absent.mean_at(0, positions) is None
    assert absent.missing == "no floor: because"
    assert zero.mean_at(0, positions) is None
    assert zero.missing.startswith("the floor is 0")


def test_float32_products_add_the_bias_before_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).half() for shape in ((5, 300), (7, 300), (7,)))
    exact = (x.double() @ weight.double().T + bias.double()).half()
    with Float32Products():
        assert torch.equal(torch.nn.functional.linear(x, weight, bias), exact)
        assert torch.equal(torch.nn.functional.linear(x, weight, bias=bias), exact)
