"""fuse --min-tensorrt, quantize, build: the plans pass an audit whose limits are those of attention in older operators, and say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from artifact.config import LlamaConfig
from artifact.manifest import read_manifest
from commands.build import BuildOptions, build
from commands.export import ExportOptions, export
from commands.graphs import fuse, quantize
from engines.audit import audit_plan
from exporter.checkpoints import CheckpointRequest

IN_DECODE = {
    2: ["fused_attention_decode", "kernels_per_layer_decode", "copies_per_layer_decode", "copied_caches_per_layer_decode"],
    4: ["copied_caches_per_layer_decode"],
}
"""Key heads beside four query heads → the checks that the limits of one Attention node would fail."""


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped", "multi-head"])
def lowered(request: pytest.FixtureRequest, make_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Heads of 64, for which TensorRT has attention kernels, and the number of key heads."""
    folder = tmp_path_factory.mktemp("lowered")
    source = make_checkpoint(folder / "checkpoint", head_dim=64, num_attention_heads=4, num_key_value_heads=request.param)
    export(CheckpointRequest(str(source)), folder / "artifact", ExportOptions())
    fuse(folder / "artifact", min_tensorrt="10.0")
    return folder / "artifact", request.param


@pytest.mark.parity
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_plan_of_an_older_release_s_graph_passes_its_own_limits(lowered: tuple[Path, int], precision: str) -> None:
    artifact, n_key_heads = lowered
    if precision == "int8":
        quantize(artifact)
    report = build(artifact, precision, BuildOptions(max_batch=2)).report
    (engine,) = report["engines"]
    assert report["passed"] is True
    assert engine["min_tensorrt"] == "10.0"
    assert engine["lowered"]["Attention"] == 2
    assert engine["notes"] == ["attention is in operators of TensorRT 10.0 (fuse --min-tensorrt), for which the audit has limits of its own"]
    config = LlamaConfig(**read_manifest(artifact)["model"]["config"])
    usual = audit_plan(artifact / engine["file"], artifact / engine["graph"], precision=precision, profiles=list(engine["profiles"]), config=config)
    failed = [check["check"] for check in usual["audit"]["checks"] if check["passed"] is False]
    written_out = ["quantized_gemms_decode", "weights_written_out"] if (precision, n_key_heads) == ("int8", 2) else []
    assert failed == IN_DECODE[n_key_heads] + written_out
