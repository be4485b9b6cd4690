from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from exporter.checkpoints import open_checkpoint

Writer = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("value", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "bitnet"}, "bitnet"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"surprise": 1}, "unknown method"),
        ({"quantization": "x"}, "unknown method"),
    ],
)
def test_open_checkpoint_names_the_method_of_a_quantization_config(write_folder: Writer, config: LlamaConfig, value: Any, method: str) -> None:
    with pytest.raises(CheckpointError, match=rf"the checkpoint is quantised \('{method}'\): config\.json has quantization_config"):
        open_checkpoint(str(write_folder(config.to_hf() | {"quantization_config": value})))


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
        ("quantize_config.json", {"quant_method": "awq"}, "awq"),
        ("quantize_config.json", [], "gptq"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "awq"),
    ],
)
@pytest.mark.parametrize("source", ["write_folder", "write_bin"])
def test_open_checkpoint_finds_what_a_quantising_tool_left(request: pytest.FixtureRequest, source: str, file: str, content: Any, method: str) -> None:
    folder = request.getfixturevalue(source)()
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"the checkpoint is quantised \('{method}'\): {file} is there"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("tensors", "method"),
    [
        (
            {".qweight": torch.ones(4, 32, dtype=torch.int32), ".qzeros": torch.ones(1, 4, dtype=torch.int32), ".scales": torch.ones(1, 32)},
            "gptq or awq",
        ),
        ({".g_idx": torch.ones(32, dtype=torch.int32)}, "gptq"),
        ({".weight": torch.ones(32, 32, dtype=torch.int8), ".SCB": torch.ones(32)}, "bitsandbytes int8"),
        ({".weight": torch.ones(512, 1, dtype=torch.uint8), ".weight.absmax": torch.ones(16)}, "bitsandbytes"),
        ({".weight": torch.ones(512, 1, dtype=torch.uint8), ".weight.quant_state.bitsandbytes__nf4": torch.ones(8)}, "bitsandbytes nf4"),
        ({".weight_packed": torch.ones(32, 4, dtype=torch.int32)}, "compressed-tensors"),
        ({".weight": torch.ones(32, 32).to(torch.float8_e4m3fn), ".weight_scale_inv": torch.ones(1, 1)}, "fp8"),
        ({".weight": torch.ones(32, 32).to(torch.float8_e4m3fn), ".weight_scale": torch.ones(1)}, "fp8 or int8 with scales"),
    ],
)
@pytest.mark.parametrize("source", ["write_folder", "write_bin"])
def test_open_checkpoint_knows_quantised_tensors_by_name(
    request: pytest.FixtureRequest, weights: dict[str, Tensor], source: str, tensors: dict[str, Tensor], method: str
) -> None:
    stored = {name: weights[name] for name in weights if name != f"{Q}.weight"} | {Q + suffix: tensor for suffix, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=rf"the checkpoint is quantised \('{method}'\): tensor {Q}\.\S+ is there") as caught:
        open_checkpoint(str(request.getfixturevalue(source)(tensors=stored)))
    assert "original" in (caught.value.hint or "")
