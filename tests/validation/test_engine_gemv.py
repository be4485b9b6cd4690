"""validation/engine_graph.py of a decode that adds up in another order: as near to the reference as its stage, in the form that its name says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from artifact.manifest import fingerprint, read_manifest, write_manifest
from artifact.steps import StepContext, run_step
from engines.decode_gemv import SUFFIX
from engines.engine_graph import write_engine_graph
from graphs.pipeline import fuse_artifact
from validation.parity import validate_artifact

pytestmark = pytest.mark.parity
STAGE = "fused-engine-gemv"
Edit = Callable[[ir.Model], None]


def largest_products(model: ir.Model) -> None:
    """Of decode's first q·k·v the largest product in the place of the sum."""
    node = next(node for node in model.graph if str(node.name).endswith(f"qkv_proj.MatMul_sum{SUFFIX}"))
    node.op_type = "ReduceMax"


def rows_in_decode_too(model: ir.Model) -> None:
    """The sizes say that prefill and decode both go to the GEMM: the same numbers, and not the form that the name says."""
    node = next(node for node in model.graph if node.name == "gemv_count")
    node.op_type = "Sub"
    node.replace_input_with(0, node.inputs[1])


@pytest.fixture
def measure(artifact: Path, checkpoint: Any) -> Callable[..., dict[str, Any]]:
    run_step(artifact, "fuse", {}, fuse_artifact)

    def run(edit: Edit | None = None, *, decode_gemv: bool = True) -> dict[str, Any]:
        graph = artifact / f"{STAGE}.onnx"
        write_engine_graph(artifact / "fused.onnx", graph, decode_gemv=decode_gemv)
        if edit is not None:
            model = ir.load(graph)
            edit(model)
            ir.save(model, graph)
        manifest = read_manifest(artifact)
        manifest["steps"]["fuse"]["outputs"][graph.name] = fingerprint(graph)
        write_manifest(artifact, manifest)
        report = validate_artifact(StepContext(artifact), checkpoint=checkpoint, stages=[STAGE], text=None, tokens=None)
        (entry,) = report["stages"]
        return dict(entry)

    return run


def checks_of(entry: dict[str, Any]) -> dict[str, tuple[bool | None, Any]]:
    return {check["check"]: (check["passed"], check["value"]) for check in entry["checks"]}


def test_it_is_as_near_to_the_reference_as_its_stage(measure: Callable[..., dict[str, Any]]) -> None:
    entry = measure()
    checks = checks_of(entry)
    assert checks.keys() == {"engine_noise_ratio", "engine_structure"}
    assert (entry["passed"], checks["engine_structure"]) == (True, (True, 0))
    assert 0.5 < checks["engine_noise_ratio"][1] < 1.5
    assert entry["engine_difference"] < 2**-8  # measured, not judged


def test_other_sums_fail_in_both(measure: Callable[..., dict[str, Any]]) -> None:
    checks = checks_of(measure(largest_products))
    assert {name for name, (passed, _) in checks.items() if passed is False} == {"engine_noise_ratio", "engine_structure"}
    assert checks["engine_noise_ratio"][1] > 10


@pytest.mark.parametrize(("edit", "decode_gemv"), [(rows_in_decode_too, True), (None, False)])
def test_the_usual_form_under_this_name_is_not_it(measure: Callable[..., dict[str, Any]], edit: Edit | None, decode_gemv: bool) -> None:
    checks = checks_of(measure(edit, decode_gemv=decode_gemv))
    assert (checks["engine_noise_ratio"][0], checks["engine_structure"][0]) == (True, False)
