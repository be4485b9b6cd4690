"""Make the pinned checkpoints beside this file with the tools that users quantise with; not run by tests.

    python -m venv ENV && ENV/bin/pip install torch==2.13.0+cpu llmcompressor==0.14.0.1 transformers==5.17.0
    ENV/bin/python make_checkpoints.py llmcompressor
    python -m venv ENV && ENV/bin/pip install torch==2.13.0+cpu nvidia-modelopt==0.47.0 transformers==5.15.0 accelerate datasets requests
    ENV/bin/python make_checkpoints.py modelopt

Each is one layer of random weights (seed 0). expected.json pins what the tool's own code makes of its integers in float32: the SHA-256 of every
linear's weight.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
TENSOR = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
COMPRESSED: dict[str, dict[str, Any]] = {
    "w8a16-pack": {"weights": CHANNEL},
    "w8a16-naive": {"weights": CHANNEL, "format": "naive-quantized"},
    "w8a16-tensor": {"weights": CHANNEL | {"strategy": "tensor"}},
    "w8a8-dynamic": {"weights": CHANNEL, "input_activations": TOKEN},
    "w8a8-static": {"weights": CHANNEL, "input_activations": TENSOR},
    "w4a16-pack": {"weights": GROUP},
    "w4a16-asymmetric": {"weights": GROUP | {"symmetric": False}},
}
MODELOPT = {"modelopt-w8a16": "INT8_WEIGHT_ONLY_CFG", "modelopt-w8a8": "INT8_SMOOTHQUANT_CFG", "modelopt-w4a16": "INT4_AWQ_CFG"}
IDS = 16


def tiny_model(folder: str) -> LlamaForCausalLM:
    """One layer, grouped heads; by way of a folder, because both tools copy from where a model came."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(**shape, num_hidden_layers=1, vocab_size=32, max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def calibrate(model: Any) -> None:
    """Some random sequences, through the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(8):
            model(torch.randint(3, 32, (1, IDS), generator=generator))


def make_compressed(name: str, folder: Path, original: str) -> None:
    """A checkpoint of llm-compressor; static scales are measured with its own hooks."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = tiny_model(original)
    modifier = QuantizationModifier(config_groups={"group_0": {"targets": ["Linear"], **COMPRESSED[name]}}, ignore=["lm_head"])
    data: dict[str, Any] = {}
    if name == "w8a8-static":
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        rows = torch.randint(3, 32, (8, IDS), generator=torch.Generator().manual_seed(1)).tolist()
        dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * IDS] * len(rows)})
        processor = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), pad_token="a")
        data = {"dataset": dataset, "processor": processor, "num_calibration_samples": len(rows), "max_seq_length": IDS}
    oneshot(model=model, recipe=[modifier], **data)
    model.save_pretrained(folder, save_compressed=True)


def make_modelopt(name: str, folder: Path, original: str) -> None:
    """A checkpoint of ModelOpt's unified export; blocks of 32, for the rows are no longer."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    config = eval(repr(getattr(mtq, MODELOPT[name])).replace("128", "32"))
    model = mtq.quantize(tiny_model(original), config, None if name == "modelopt-w8a16" else calibrate)
    export_hf_checkpoint(model, export_dir=folder)


def compressed_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every linear as compressed-tensors decompresses it, with its scale in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    scheme, compressor = QuantizationScheme(**group), BaseCompressor.get_value_from_registry(group["format"])
    found = {}
    for module in modules(tensors):
        state = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")}
        found[module] = compressor.decompress(state | {"weight_scale": state["weight_scale"].float()}, scheme)["weight"]
    return found


def modelopt_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every linear as ModelOpt turns its integers back; of four bits it can pack alone, so what is unpacked here must pack to the same bytes."""
    from modelopt.torch.export.quant_utils import from_quantized_weight, pack_int4_in_uint8

    found = {}
    for module in modules(tensors):
        weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
        if weight.dtype is torch.int8:
            found[module] = from_quantized_weight(weight, scale, "int8_sq", torch.float32)
            continue
        values = torch.empty(2 * len(weight), weight.shape[1])
        for row in range(len(values)):
            nibble = (weight[row // 2].to(torch.int32) >> (4 * (row % 2))) & 15
            values[row] = torch.where(nibble > 7, nibble - 16, nibble) * scale[row].repeat_interleave(weight.shape[1] // scale.shape[1])
        assert torch.equal(pack_int4_in_uint8(values, scale, weight.shape[1] // scale.shape[1]), weight)
        found[module] = values
    return found


def modules(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Quantised linears."""
    return [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]


def main() -> None:
    """Make one tool's checkpoints, and pin what they hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=["llmcompressor", "modelopt"])
    compressed = parser.parse_args().tool == "llmcompressor"
    for name in COMPRESSED if compressed else MODELOPT:
        folder = HERE / name
        with tempfile.TemporaryDirectory() as original:
            (make_compressed if compressed else make_modelopt)(name, folder, original)
        for extra in ("generation_config.json", "recipe.yaml"):
            (folder / extra).unlink(missing_ok=True)
        if name == "w4a16-asymmetric":
            continue
        tensors = load_file(folder / "model.safetensors")
        weights = compressed_weights(folder, tensors) if compressed else modelopt_weights(tensors)
        pinned = {module: hashlib.sha256(weight.float().contiguous().numpy().tobytes()).hexdigest() for module, weight in weights.items()}
        (folder / "expected.json").write_text(json.dumps(pinned, indent=1) + "\n")


if __name__ == "__main__":
    main()
