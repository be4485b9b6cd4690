"""What a user gets from torch.onnx.export(dynamo=True): a Hugging Face Llama in float16, with its cache as plain inputs and outputs.

    python benchmarks/export_dynamo.py CHECKPOINT OUT.onnx

Needs transformers; all else is the exporter's default.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

BATCH, NEW, PAST = 2, 5, 7


class Flat(torch.nn.Module):
    """The model, its cache as pairs of tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        """Logits, and the present keys and values of every layer."""
        cache = DynamicCache(config=self.model.config)
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        found = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True)
        return found.logits, [(layer.keys, layer.values) for layer in found.past_key_values.layers]


def example(config: Any, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call of ``Flat`` to trace, and its dynamic axes: batch, tokens and past."""
    layers, width = config.num_hidden_layers, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (BATCH, config.num_key_value_heads, PAST, width)
    tokens, cache = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}
    inputs = {
        "input_ids": torch.zeros(BATCH, NEW, dtype=torch.int64),
        "attention_mask": torch.ones(BATCH, PAST + NEW, dtype=torch.int64),
        "position_ids": torch.arange(PAST, PAST + NEW)[None].repeat(BATCH, 1),
        "past": [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(layers)],
    }
    return inputs, {"input_ids": tokens, "attention_mask": tokens, "position_ids": tokens, "past": [(cache, cache)] * layers}


def main(checkpoint: str, out: str) -> None:
    """Load, trace, save."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16).eval()
    inputs, axes = example(model.config, torch.float16)
    names = [f"{layer}.{kind}" for layer in range(model.config.num_hidden_layers) for kind in ("key", "value")]
    torch.onnx.export(
        Flat(model), (), out, kwargs=inputs, dynamo=True, external_data=True, verbose=False, dynamic_shapes=axes,
        input_names=[*list(inputs)[:3], *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
