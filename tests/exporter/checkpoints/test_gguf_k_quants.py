"""K-quants: the package can't make them, so blocks of every possible content are made here and dequantised once more, number by number."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from artifact.config import LlamaConfig
from artifact.layout import tensor_shapes
from exporter.checkpoints import open_checkpoint

Writer = Callable[..., Path]
Block = np.ndarray[Any, np.dtype[np.uint8]]
SIZE = 256
BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where a block holds its float16 factors."""


def blocks_of(row: np.ndarray[Any, Any], kind: str) -> Block:
    """Blocks for a row: random bytes that follow from its numbers, with factors of a sane size."""
    generator = np.random.default_rng(zlib.crc32(np.ascontiguousarray(row).tobytes()))
    blocks = generator.integers(0, 256, (len(row) // SIZE, BYTES[kind]), dtype=np.uint8)
    for place in FACTORS[kind]:
        blocks[:, place : place + 2] = generator.uniform(0.001, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(-1)


def factor(block: Block, place: int) -> float:
    return float(block[place : place + 2].view(np.float16)[0])


def six_bits(scales: list[int], j: int) -> tuple[int, int]:
    """Scale and minimum of sub-block j of Q4_K and Q5_K."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return (scales[j + 4] & 15) | (scales[j - 4] >> 6 << 4), (scales[j + 4] >> 4) | (scales[j] >> 6 << 4)


def q2_k(block: Block) -> list[float]:
    scales, quants, d, low = block[:16].tolist(), block[16:80].tolist(), factor(block, 80), factor(block, 82)
    values = []
    for i in range(SIZE):
        scale = scales[i // 16]
        value = quants[i // 128 * 32 + i % 32] >> (2 * (i % 128 // 32)) & 3
        values.append(d * (scale & 15) * value - low * (scale >> 4))
    return values


def q3_k(block: Block) -> list[float]:
    high, quants, packed, d = block[:32].tolist(), block[32:96].tolist(), block[96:108].tolist(), factor(block, 108)
    values = []
    for i in range(SIZE):
        j = i // 16
        scale = (packed[j % 8] >> (4 * (j // 8)) & 15) | (packed[8 + j % 4] >> (2 * (j // 4)) & 3) << 4
        value = (quants[i // 128 * 32 + i % 32] >> (2 * (i % 128 // 32)) & 3) - (0 if high[i % 32] >> (i // 32) & 1 else 4)
        values.append(d * (scale - 32) * value)
    return values


def q4_k(block: Block, fifth: list[int] | None = None) -> list[float]:
    quants, d, low = block[-128:].tolist(), factor(block, 0), factor(block, 2)
    values = []
    for i in range(SIZE):
        scale, minimum = six_bits(block[4:16].tolist(), i // 32)
        value = quants[i // 64 * 32 + i % 32] >> (4 * (i // 32 % 2)) & 15
        value += 16 * (fifth[i % 32] >> (i // 32) & 1) if fifth else 0
        values.append(d * scale * value - low * minimum)
    return values


def q5_k(block: Block) -> list[float]:
    return q4_k(block, block[16:48].tolist())


def q6_k(block: Block) -> list[float]:
    low, high, scales, d = block[:128].tolist(), block[128:192].tolist(), block[192:208].view(np.int8).tolist(), factor(block, 208)
    values = []
    for i in range(SIZE):
        half, place = divmod(i, 128)
        value = low[half * 64 + place % 64] >> (4 * (place // 64)) & 15
        value |= (high[half * 32 + place % 32] >> (2 * (place // 32)) & 3) << 4
        values.append(d * scales[i // 16] * (value - 32))
    return values


@pytest.mark.parametrize(("kind", "dequantise"), [("Q2_K", q2_k), ("Q3_K", q3_k), ("Q4_K", q4_k), ("Q5_K", q5_k), ("Q6_K", q6_k)])
def test_open_gguf_dequantises_k_quants(write_gguf: Writer, config: LlamaConfig, kind: str, dequantise: Callable[[Block], list[float]]) -> None:
    shape = replace(config, hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=1, vocab_size=8)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(dims, generator=generator) for name, dims in tensor_shapes(shape).items()}

    def quantize(array: np.ndarray[Any, Any], stored: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
        return array if stored == gguf.GGMLQuantizationType.F32 else np.stack([blocks_of(row, kind) for row in array])

    checkpoint = open_checkpoint(str(write_gguf(tensors=weights, kind=kind, config=shape, quantize=quantize)))
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        assert checkpoint.dtypes[name] == kind
        for row in range(0, len(weights[name]), 29):  # rows of every place in a head
            blocks = blocks_of(weights[name][row].numpy(), kind).reshape(-1, BYTES[kind])
            expected = torch.tensor([value for block in blocks for value in dequantise(block)])
            ours = checkpoint.read_rows(name, row, row + 1)[0]
            assert ours.abs().max() > 0.01
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
