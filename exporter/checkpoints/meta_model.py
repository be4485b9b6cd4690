"""Read a Meta folder: consolidated.*.pth with params.json, parts merged and rotary rows put in Hugging Face's order as they are read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from artifact.errors import CheckpointError
from artifact.layout import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix
from exporter.checkpoints.census import by_model_name, check_tensors
from exporter.checkpoints.file_tensor import TORCH_DTYPES
from exporter.checkpoints.fingerprint import fingerprint_files, state_of
from exporter.checkpoints.meta_config import LLAMA2_IDS, PARAMS, config_from_meta, read_params, unknown_params
from exporter.checkpoints.meta_parts import MergedTensor, merge_parts, open_parts, refuse_copies
from exporter.checkpoints.protocol import CheckpointFacts, Write, folder_name
from exporter.checkpoints.shards import inside
from exporter.checkpoints.vocabulary import model_notes, sentencepiece_size
from exporter.rope import INTERLEAVED, deinterleave

SHARED_NAMES = {"tok_embeddings.weight": EMBEDDING, "norm.weight": FINAL_NORM, "output.weight": LM_HEAD}
LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOKENIZER = "tokenizer.model"
LLAMA_TOKENIZER = {
    **{"tokenizer_class": "LlamaTokenizer", "model_max_length": 1000000000000000019884624838656, "clean_up_tokenization_spaces": False},
    **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": False},
}
"""tokenizer_config.json for Meta's SentencePiece file, which says nothing of how it is used."""
NOT_SENTENCEPIECE = (
    f"{TOKENIZER} is not SentencePiece, as Llama 3's is not: it is copied, but bos, eos and a tokenizer_config.json are not known from it"
)
NO_TOKENIZER = f"no {TOKENIZER} in the folder or the one above: text needs it, the weights don't"


@dataclass(kw_only=True)
class MetaCheckpoint(CheckpointFacts):
    """A checked folder; attributes as in ``Checkpoint``, and ``tokens``, the number that a SentencePiece tokenizer has."""

    tensors: dict[str, MergedTensor] = field(repr=False)
    tokenizer: Path | None
    tokens: int | None
    format: str = "meta"

    def read(self, name: str) -> Tensor:
        """One weight as stored, all parts of it; KeyError for a name the model does not have."""
        return self.read_rows(name, 0, self.shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one weight; whole heads of q and k are read, for the rows of a head are in another order."""
        tensor = self.tensors[name]
        if not name.endswith(INTERLEAVED):
            return tensor.read_rows(start, stop)
        head_dim = self.config.head_dim
        first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        return deinterleave(tensor.read_rows(first, last), head_dim)[start - first : stop - first]

    def write_sidecars(self, write: Write) -> list[str]:
        """Write config.json and, where there is one, the tokenizer; with a configuration for it where it is SentencePiece."""
        with write("config.json") as target:
            target.write_text(json.dumps(self.config.to_hf(), indent=2) + "\n", encoding="utf-8")
        if self.tokenizer is None:
            return ["config.json"]
        with write(TOKENIZER) as target:
            shutil.copyfile(self.tokenizer, target)
        if self.tokens is None:
            return ["config.json", TOKENIZER]
        with write("tokenizer_config.json") as target:
            target.write_text(json.dumps(LLAMA_TOKENIZER, indent=2) + "\n", encoding="utf-8")
        return ["config.json", TOKENIZER, "tokenizer_config.json"]


def open_meta(folder: Path, *, size: str | None = None) -> MetaCheckpoint:
    """Open a folder and check all of it but the values.

    Args:
        folder: with params.json and every consolidated.*.pth.
        size: what ``--size`` said, for the context length that params.json does not give.

    Raises:
        CheckpointError: no or an unsupported params.json, a part missing, broken or a copy of another, or tensors that disagree with
            it or with each other.
    """
    folder = folder.resolve()
    params = read_params(folder)
    parts = open_parts(folder)
    tensors = by_model_name(merge_parts(parts, params["dim"]), huggingface_name)
    ffn, vocab_size = _rows(tensors, f"{layer_prefix(0)}.mlp.gate_proj.weight"), _rows(tensors, EMBEDDING)
    tokenizer = _tokenizer(folder)
    tokens = sentencepiece_size(tokenizer) if tokenizer else None
    ids = LLAMA2_IDS if tokens is not None or tokenizer is None else (None, None)
    config, notes = config_from_meta(params, ffn=ffn, vocab_size=vocab_size, size=size, ids=ids)
    shapes, dropped = check_tensors(config, {name: tensor.shape for name, tensor in tensors.items()}, equal=lambda ours, theirs: False)
    _check_dtypes(tensors, shapes)
    refuse_copies(tensors[f"{layer_prefix(0)}.self_attn.{name}_proj.weight"] for name in "qo")
    spans = ((part.path, part.header_bytes, sorted({(tensor.offset, tensor.length) for tensor in part.tensors.values()})) for part in parts)
    return MetaCheckpoint(
        source=str(folder),
        name=folder_name(folder.parent.name if folder.name == "original" else folder.name),
        tensors=tensors,
        tokenizer=tokenizer,
        tokens=tokens,
        config=config,
        shapes=shapes,
        dtypes={name: tensors[name].pieces[0].dtype for name in shapes},
        dropped=dropped,
        unknown_config_keys=unknown_params(params),
        notes=[*notes, *model_notes(config, tokens), *_tokenizer_notes(tokenizer, tokens)],
        fingerprint=fingerprint_files(json.dumps([params, config.max_position_embeddings], sort_keys=True).encode(), spans),
        state=state_of([*(part.path for part in parts), folder / PARAMS, *([tokenizer] if tokenizer else [])]),
    )


def huggingface_name(name: str) -> str:
    """`layers.3.attention.wq.weight` → `model.layers.3.self_attn.q_proj.weight`; a name that no table has stays, and is an extra tensor."""
    match = re.fullmatch(r"layers\.(\d+)\.([\w.]+)\.weight", name)
    if match and match[2] in LAYER_NAMES:
        return f"{layer_prefix(int(match[1]))}.{LAYER_NAMES[match[2]]}.weight"
    return SHARED_NAMES.get(name, name)


def _rows(tensors: Mapping[str, MergedTensor], name: str) -> int:
    if name not in tensors or not tensors[name].shape:
        raise CheckpointError(f"missing tensor {name}", hint="download the checkpoint again; a file may be missing")
    return tensors[name].shape[0]


def _check_dtypes(tensors: Mapping[str, MergedTensor], names: Mapping[str, object]) -> None:
    for name in names:
        piece = tensors[name].pieces[0]
        if piece.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{piece.path.name}: tensor {name} has dtype {piece.dtype}; supported: {', '.join(TORCH_DTYPES)}")


def _tokenizer_notes(tokenizer: Path | None, tokens: int | None) -> list[str]:
    if tokenizer is None:
        return [NO_TOKENIZER]
    return [NOT_SENTENCEPIECE] if tokens is None else []


def _tokenizer(folder: Path) -> Path | None:
    """Meta keeps one tokenizer.model above the folders of all sizes."""
    if inside(folder, TOKENIZER).is_file():
        return folder / TOKENIZER
    above = folder.parent / TOKENIZER
    return above if above.is_file() and not above.is_symlink() else None
