"""benchmarks/gpu_proof.py: which commands it gives, what it makes of their reports, and that nothing left out looks proven."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_proof import BATCHES, Proof, Ran, describe, exit_code, prove

ROOT = Path(__file__).resolve().parents[1]
BENCH = {
    "stage": "int8", "backend": "tensorrt 11.1.0.106", "batch": 4, "prefill_tokens_per_s": 152000.4, "decode_tokens_per_s": 541.2,
    "roofline": {"prefill_share": 0.61, "decode_share": 0.7}, "tokens": {"equal": 63, "checked": 64},
}  # fmt: skip
GRAPHS = {"fp16": "fused-engine-gemv.onnx", "int8": "int8-engine.onnx"}
VALID: dict[str, Any] = {"verdict": "passed: 7 of 7 stages ran", "headline": "structure and quality proven", "not_run": []}

BUILT = VALID | {f"build-{precision}": {"engines": [{"graph": graph}]} for precision, graph in GRAPHS.items()}


def ran(*arguments: str, code: int = 0, report: dict[str, Any] | None = None, error: str = "") -> Ran:
    return Ran(arguments, code, report, error, 1.0)


def test_each_backend_is_built_validated_and_timed_on_an_artifact_of_its_own(tmp_path: Path) -> None:
    given: list[Sequence[str]] = []

    def cli(arguments: Sequence[str]) -> Ran:
        given.append(arguments)
        missing = "tensorrt-rtx" in arguments
        return ran(*arguments, code=int(missing), report=None if missing else BUILT)

    commands = prove(Proof("demo", tmp_path, "a100-80gb", ("fp16", "int8"), ("tensorrt", "tensorrt-rtx"), cli))
    assert [one[0] for one in given] == ["run", "validate", *["bench"] * 2 * len(BATCHES), "run"]
    assert list(given[0][:3]) == ["run", "--checkpoint", "demo"]
    assert {given[0][-1], given[-1][-1]} == {str(tmp_path / "tensorrt"), str(tmp_path / "tensorrt-rtx")}
    assert [one[3] for one in given if one[0] == "bench"] == ["fused-engine-gemv"] * 2 + ["int8-engine"] * 2
    assert exit_code(commands) == 1


@pytest.mark.parametrize(
    ("usual", "other", "option"),
    [("fused-engine-gemv", "fused-engine", "--no-decode-gemv"), ("fused-engine", "fused-engine-gemv", "--decode-gemv")],
)
def test_tensorrt_rtx_is_timed_with_both_forms_of_decode(tmp_path: Path, usual: str, other: str, option: str) -> None:
    given: list[Sequence[str]] = []

    def cli(arguments: Sequence[str]) -> Ran:
        given.append(arguments)
        engines = {"engines": [{"graph": f"{other if arguments[0] == 'build' else usual}.onnx"}]}
        return ran(*arguments, report={**BUILT, **engines, "build-fp16": engines})

    prove(Proof("demo", tmp_path, "a100-80gb", ("int8", "fp16"), ("tensorrt-rtx",), cli))
    timed = ["bench"] * len(BATCHES)
    assert [one[0] for one in given] == ["run", "validate", *timed, *timed, "build", "validate", *timed]
    assert list(given[6]) == ["build", str(tmp_path / "tensorrt-rtx"), "--precision", "fp16", *given[0][7:13], option]
    assert list(given[0][7:13]) == ["--backend", "tensorrt-rtx", "--target", "a100-80gb", "--max-batch", "4"]
    assert list(given[7][2:]) == ["--stage", "fused", "--device", "cuda"]
    assert [one[3] for one in given if one[0] == "bench"][::2] == ["int8-engine", usual, other]


def test_a_form_that_could_not_be_built_is_not_timed(tmp_path: Path) -> None:
    def cli(arguments: Sequence[str]) -> Ran:
        refused = arguments[0] == "build"
        return ran(*arguments, code=int(refused), report=None if refused else BUILT)

    commands = prove(Proof("demo", tmp_path, "a100-80gb", ("fp16",), ("tensorrt-rtx",), cli))
    assert [one.arguments[0] for one in commands] == ["run", "validate", *["bench"] * len(BATCHES), "build"]
    assert exit_code(commands) == 1


def test_the_form_of_decode_stands_beside_the_precision() -> None:
    commands = [ran("bench", "proof/tensorrt-rtx", report={**BENCH, "stage": "fused-engine-gemv"})]
    assert "| fp16 --decode-gemv | 4 |" in describe("NVIDIA A100-SXM4-80GB", {}, commands)


@pytest.mark.parametrize(
    ("commands", "code"),
    [
        ([], 1),
        ([ran("run", report={}), ran("validate", report=VALID)], 0),
        ([ran("run", report={}), ran("validate", code=3, report=VALID), ran("bench", code=1)], 3),
        ([ran("validate", report={**VALID, "not_run": [{"stage": "engine a100-80gb-fp16", "reason": "built for 8.0"}]})], 1),
        ([ran("validate", report={**VALID, "not_run": [{"stage": "odd", "reason": "not a stage that this version knows"}]})], 0),
    ],
)
def test_only_what_ran_and_matched_is_proven(commands: list[Ran], code: int) -> None:
    assert exit_code(commands) == code


def test_the_figures_stand_with_the_gpus_name_and_with_what_is_missing() -> None:
    left_out = {**VALID, "not_run": [{"stage": "engine a100-80gb-int8", "reason": "built for compute capability 8.0"}]}
    commands = [
        ran("validate", "proof/tensorrt", report=left_out),
        ran("bench", "proof/tensorrt", report=BENCH),
        ran("run", "--backend", "tensorrt-rtx", code=1, error="error: this machine can't build engines"),
    ]
    text = describe("NVIDIA A100-SXM4-80GB", {"tensorrt": "11.1.0.106", "numpy": "2.4"}, commands)
    assert text.startswith("# Run on NVIDIA A100-SXM4-80GB\n\ntensorrt 11.1.0.106\n")
    assert "| tensorrt 11.1.0.106 | int8 | 4 | 152,000 | 61% | 541 | 70% | 63 of 64 |" in text
    assert "- `proof/tensorrt`: passed: 7 of 7 stages ran; structure and quality proven" in text
    assert "- engine a100-80gb-int8: built for compute capability 8.0" in text
    assert "exit code 1; error: this machine can't build engines" in text


def test_without_a_gpu_it_says_that_nothing_can_be_proven(tmp_path: Path) -> None:
    code = "import benchmarks.gpu_proof as proof; proof.find_device = lambda: 'no NVIDIA driver here'; proof.main()"
    done = subprocess.run([sys.executable, "-c", code, "--out", str(tmp_path / "proof")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: nothing can be proven here: no NVIDIA driver here" in done.stderr
    assert not (tmp_path / "proof").exists()


def test_the_container_pins_its_image_and_runs_the_script() -> None:
    text = (ROOT / "containers" / "Dockerfile").read_text()
    assert re.search(r"^ARG TENSORRT_IMAGE=nvcr\.io/nvidia/tensorrt:\d\d\.\d\d-py3$", text, re.MULTILINE)
    assert 'CMD ["scripts/gpu-proof"]' in text
    assert "constraints.txt" in text
