"""Read a GGUF file of the Llama architecture: Hugging Face names, plain row order, one dequantised tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.layout import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix
from exporter.checkpoints import gguf_rope
from exporter.checkpoints.census import by_model_name, check_tensors
from exporter.checkpoints.file_tensor import AGAIN, TORCH_DTYPES, FileTensor
from exporter.checkpoints.fingerprint import fingerprint_files, state_of
from exporter.checkpoints.gguf_config import config_from_gguf
from exporter.checkpoints.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from exporter.checkpoints.gguf_tokenizer import tokenizer_files
from exporter.checkpoints.protocol import CheckpointFacts, Write, folder_name
from exporter.checkpoints.vocabulary import model_notes
from exporter.rope import INTERLEAVED, deinterleave

SHARED_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": LM_HEAD}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
CHUNK_ELEMENTS = 1 << 20
"""Elements dequantised at once: small enough to stay in the cache, and the temporaries out of the memory peak."""


@dataclass(kw_only=True)
class GgufCheckpoint(CheckpointFacts):
    """A checked GGUF file; attributes as in ``Checkpoint``."""

    path: Path
    stored: dict[str, GgufTensor] = field(repr=False)
    sidecars: dict[str, str] = field(repr=False)
    format: str = "gguf"

    def read(self, name: str) -> Tensor:
        """One weight; float16 and bfloat16 stay, quantised blocks become float32; q and k rows in Hugging Face's order."""
        return self.read_rows(name, 0, self.shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one weight, as ``read`` gives them; whole heads of q and k are read, for the rows of a head are in another order."""
        tensor = self.stored[name]
        if not name.endswith(INTERLEAVED):
            return load_tensor(self.path, rows_of(tensor, start, stop))
        head_dim = self.config.head_dim
        first, last = start // head_dim, -(-stop // head_dim)
        heads = load_tensor(self.path, rows_of(tensor, first * head_dim, last * head_dim))
        return deinterleave(heads, head_dim)[start - first * head_dim : stop - first * head_dim]

    def write_sidecars(self, write: Write) -> list[str]:
        """Write config.json and, where the file holds a tokenizer, tokenizer.json and tokenizer_config.json."""
        for name, text in self.sidecars.items():
            with write(name) as target:
                target.write_text(text, encoding="utf-8")
        return list(self.sidecars)


def open_gguf(path: Path, *, source: str | None = None, name: str | None = None) -> GgufCheckpoint:
    """Open a GGUF file and check all of it but the values.

    Args:
        path: the file.
        source: what to record as the source; default its absolute path.
        name: what to record as the model's name; default its stem.

    Raises:
        CheckpointError: unreadable, another architecture, an unsupported block type, or tensors that disagree with the metadata.
    """
    path = path.resolve()
    header = read_gguf_header(path)
    config, unknown = config_from_gguf(header.metadata, header.tensors)
    config, rope_notes = _with_rope_factors(config, header)
    stored = by_model_name(header.tensors, huggingface_name)
    shapes, dropped = check_tensors(config, {key: tensor.shape for key, tensor in stored.items()}, equal=lambda ours, theirs: False)
    _check_types(stored, shapes)
    tokenizer, notes = tokenizer_files(header.metadata)
    return GgufCheckpoint(
        source=source or str(path),
        name=name or folder_name(path.stem),
        path=path,
        stored=stored,
        sidecars={"config.json": json.dumps(config.to_hf(), indent=2) + "\n"} | tokenizer,
        config=config,
        shapes=shapes,
        dtypes={key: stored[key].type.name for key in shapes},
        dropped=dropped,
        unknown_config_keys=unknown,
        notes=[*rope_notes, *model_notes(config, len(header.metadata.get("tokenizer.ggml.tokens", ())) or None), *notes],
        fingerprint=_fingerprint(header),
        state=state_of([path]),
    )


def huggingface_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; a name that no table has stays, and is an extra tensor."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in LAYER_NAMES:
        return f"{layer_prefix(int(match[1]))}.{LAYER_NAMES[match[2]]}.{match[3]}"
    return SHARED_NAMES.get(name, name)


def rows_of(tensor: GgufTensor, start: int, stop: int) -> GgufTensor:
    """Where rows [start, stop) of a tensor lie: a row is whole quantised blocks."""
    row_bytes = tensor.length // tensor.shape[0]
    return GgufTensor((stop - start, *tensor.shape[1:]), tensor.type, tensor.offset + start * row_bytes, (stop - start) * row_bytes)


def load_tensor(path: Path, tensor: GgufTensor) -> Tensor:
    """Read one tensor; quantised blocks are dequantised to float32 a few rows at a time, and nothing of the file stays mapped."""
    if tensor.type.name in TORCH_DTYPES:
        return FileTensor.contiguous(path, tensor.type.name, tensor.shape, tensor.offset, tensor.length).read()
    output = np.empty(tensor.shape, dtype=np.float32)
    row_bytes, step = tensor.length // max(1, len(output)), max(1, CHUNK_ELEMENTS // tensor.shape[-1])
    with path.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        for start in range(0, len(output), step):
            count = min(step, len(output) - start)
            blocks = np.fromfile(file, dtype=np.uint8, count=count * row_bytes)
            if len(blocks) != count * row_bytes:
                raise CheckpointError(f"{path.name}: the file ends at byte {file.tell():,}, within a tensor", hint=AGAIN)
            output[start : start + count] = gguf.quants.dequantize(blocks.reshape(count, row_bytes), tensor.type)
    return torch.from_numpy(output)


def _check_types(stored: Mapping[str, GgufTensor], names: Iterable[str]) -> None:
    for name in names:
        kind = stored[name].type
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError as error:
            raise CheckpointError(f"tensor {name} is stored as {kind.name}, which the gguf package can't dequantise") from error


def _with_rope_factors(config: LlamaConfig, header: GgufHeader) -> tuple[LlamaConfig, list[str]]:
    """Llama 3.1 files carry their rope scaling in this tensor alone; without it, it would be another model."""
    tensor = header.tensors.get(gguf_rope.TENSOR)
    if tensor is None:
        return config, []
    _check_types({gguf_rope.TENSOR: tensor}, (gguf_rope.TENSOR,))
    return gguf_rope.with_frequency_factors(config, load_tensor(header.path, tensor).float())


def _fingerprint(header: GgufHeader) -> str:
    spans = sorted((tensor.offset, tensor.length) for tensor in header.tensors.values())
    return fingerprint_files(b"gguf", [(header.path, header.header_bytes, spans)])
