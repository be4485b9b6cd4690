"""exporter/checkpoints/quantised_config.py: what is read, and one error for each form that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.given import Given
from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.quantised_config import HINT, compressed_config, modelopt_config

Writer = Callable[..., Path]
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False, "group_size": None, "actorder": None}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TENSOR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 64}


def config(group: dict[str, Any] | None = None, weights: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    one = {"targets": ["Linear"], "weights": WEIGHTS | (weights or {}), "input_activations": None, "output_activations": None} | (group or {})
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": one}, "ignore": ["lm_head"]} | top


@pytest.mark.parametrize(
    ("given", "expected", "scheme", "packing"),
    [
        (config(), Given("compressed-tensors", "pack-quantized", 8, 0, "float"), "int8", "words"),
        (config(weights=GROUPS), Given("compressed-tensors", "pack-quantized", 4, 64, "float"), "int4", "words"),
        (config(weights={"num_bits": 4, "actorder": "weight"}), Given("compressed-tensors", "pack-quantized", 4, 0, "float"), "int4", "words"),
        (config(weights=GROUPS | {"num_bits": 8}), Given("compressed-tensors", "pack-quantized", 8, 64, "float"), None, "words"),
        (config({"format": "naive-quantized"}), Given("compressed-tensors", "naive-quantized", 8, 0, "float"), "int8", "plain"),
        (
            config({"input_activations": TOKEN}, format="int-quantized"),
            Given("compressed-tensors", "int-quantized", 8, 0, "dynamic"),
            "int8-smoothquant",
            "plain",
        ),
        (
            config({"input_activations": TENSOR}, format="int-quantized", sparsity_config={"format": "dense"}, kv_cache_scheme=None),
            Given("compressed-tensors", "int-quantized", 8, 0, "static"),
            "int8-smoothquant",
            "plain",
        ),
    ],
)
def test_reads_what_compressed_tensors_writes(given: dict[str, Any], expected: Given, scheme: str | None, packing: str) -> None:
    read = compressed_config(given)
    assert (read.given, read.given.scheme, read.packing) == (expected, scheme, packing)
    assert read.covers("model.layers.0.self_attn.q_proj")
    assert not read.covers("lm_head")


@pytest.mark.parametrize(
    ("facts", "expected", "packing"),
    [
        ({"quant_algo": "W8A16"}, Given("modelopt", "W8A16", 8, 0, "float"), "plain"),
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, Given("modelopt", "W8A8_SQ_PER_CHANNEL", 8, 0, "static"), "plain"),
        ({"quant_algo": "W4A16_AWQ", "group_size": 128}, Given("modelopt", "W4A16_AWQ", 4, 128, "float"), "row pairs"),
        (
            {"quant_algo": "W4A16_AWQ", "config_groups": {"group_0": {"weights": {"group_size": 64}}}},
            Given("modelopt", "W4A16_AWQ", 4, 64, "float"),
            "row pairs",
        ),
    ],
)
def test_reads_what_modelopt_writes_in_either_file(facts: dict[str, Any], expected: Given, packing: str) -> None:
    inside = modelopt_config({"quantization": facts | {"exclude_modules": ["lm_head", "model.layers.1.*"], "kv_cache_quant_algo": None}})
    beside = modelopt_config(facts | {"quant_method": "modelopt", "ignore": ["lm_head", "model.layers.1.*"]})
    assert inside == beside
    assert (inside.given, inside.packing) == (expected, packing)
    assert [inside.covers(name) for name in ("lm_head", "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj")] == [False, False, True]


@pytest.mark.parametrize(
    ("targets", "ignore", "covered"),
    [
        (["Linear"], ["re:.*down_proj"], ["q_proj"]),
        (["re:.*self_attn.*"], [], ["q_proj"]),
        (["model.layers.0.mlp.down_proj"], None, ["down_proj"]),
        (["Linear"], [], ["q_proj", "down_proj"]),
    ],
)
def test_covers_what_targets_match_and_ignore_does_not(targets: list[str], ignore: list[str] | None, covered: list[str]) -> None:
    read = compressed_config(config({"targets": targets}, ignore=ignore))
    modules = {"q_proj": "model.layers.0.self_attn.q_proj", "down_proj": "model.layers.0.mlp.down_proj"}
    assert [name for name, module in modules.items() if read.covers(module)] == covered


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (config(format="float-quantized"), r"format is 'float-quantized'"),
        (config(format="nvfp4-pack-quantized"), r"format is 'nvfp4-pack-quantized'"),
        (config({"format": "marlin-24"}), r"format is 'marlin-24'"),
        (config(weights={"type": "float"}), r"config_groups\.group_0\.weights has type 'float'"),
        (config(weights={"symmetric": False}), r"config_groups\.group_0\.weights is asymmetric"),
        (config(weights={"num_bits": 6}), r"config_groups\.group_0\.weights has 6 bits"),
        (config(weights={"strategy": "block"}), r"config_groups\.group_0\.weights has strategy 'block'"),
        (config(weights={"dynamic": True}), r"config_groups\.group_0\.weights has strategy 'channel', dynamic"),
        (config(weights={"actorder": "group"}), r"actorder 'group': columns in another order"),
        (config(weights=GROUPS | {"group_size": -5}), r"group_size is -5"),
        (config(weights=GROUPS | {"group_size": True}), r"group_size is True"),
        (config({"weights": None}), r"config_groups\.group_0\.weights is missing"),
        (config({"input_activations": TOKEN | {"symmetric": False}}), r"input_activations is asymmetric"),
        (config({"input_activations": TOKEN | {"type": "float"}}), r"input_activations has type 'float'"),
        (config({"input_activations": TOKEN | {"num_bits": 4}}), r"input_activations has 4 bits"),
        (config({"input_activations": TOKEN | {"strategy": "group"}}), r"input_activations has strategy 'group', dynamic True"),
        (config({"input_activations": [8]}), r"input_activations is no object"),
        (config({"input_activations": TOKEN}, {"num_bits": 4}), r"4-bit weights with int8 activations"),
        (config({"input_activations": TOKEN}, GROUPS | {"num_bits": 8}), r"int8 activations and a scale for 64 weights"),
        (config({"output_activations": TENSOR}), r"quantises what linears give"),
        (config(config_groups={}), r"config_groups holds no groups"),
        (config(config_groups={"W8A8": ["Linear"]}), r"config_groups holds no groups"),
        (config(config_groups={"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | GROUPS}}), r"in 2 ways, and a graph has one scheme"),
        (config(kv_cache_scheme={"num_bits": 8}), r"kv_cache_scheme is set"),
        (config(transform_config={"config_groups": {"u": {}}}), r"transform_config is set"),
        (config(sparsity_config={"format": "sparse-24-bitmask"}), r"sparsity_config says that weights are left out"),
        (config(ignore="lm_head"), r"'lm_head' is no list of modules"),
        (config(ignore=["re:("]), r"'re:\(' is no regular expression"),
    ],
)
def test_refuses_what_compressed_tensors_also_writes(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=rf"quantised \('compressed-tensors'\) in a way that is not read: .*{reason}") as caught:
        compressed_config(given)
    assert caught.value.hint == HINT


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        *(({"quant_algo": name}, f"quant_algo is '{name}'") for name in ("FP8", "NVFP4", "W4A8_AWQ", "MIXED_PRECISION", "MXFP8")),
        ({}, "quant_algo is 'None'"),
        ({"quant_algo": "W8A16", "kv_cache_quant_algo": "FP8"}, "the cache is to be quantised"),
        ({"quant_algo": "W4A16_AWQ"}, "group_size is missing"),
        ({"quant_algo": "W4A16_AWQ", "group_size": "128"}, "group_size is '128'"),
    ],
)
def test_refuses_what_modelopt_also_writes(facts: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=rf"quantised \('modelopt'\) in a way that is not read: {reason}"):
        modelopt_config({"quantization": facts})


@pytest.mark.parametrize("source", ["write_folder", "write_bin"])
@pytest.mark.parametrize("content", [{"quantization": {"quant_algo": "FP8"}}, {"quantization": 3}])
def test_file_beside_the_weights_is_read_too(request: pytest.FixtureRequest, source: str, content: Any) -> None:
    folder = request.getfixturevalue(source)()
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"quantised \('modelopt'\) in a way that is not read: quant_algo is"):
        open_checkpoint(str(folder))


def test_older_key_is_read_as_the_newer(write_folder: Writer, config: LlamaConfig) -> None:
    quantised = {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"group_0": {"weights": WEIGHTS}}}
    with pytest.raises(CheckpointError, match="format is 'marlin-24'"):
        open_checkpoint(str(write_folder(config.to_hf() | {"compression_config": quantised})))
