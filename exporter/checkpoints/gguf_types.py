"""What type the keys of a GGUF file have that are read; a value of another type is refused by name, before anything is done with it.

Numbers of the model (``llama.*``) are checked where they are read, ids of tokens by LlamaConfig.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifact.errors import CheckpointError
from artifact.numbers import token_id

TYPES: Mapping[str, type] = {
    "general.architecture": str,
    "llama.rope.scaling.type": str,
    "split.count": int,
    "tokenizer.chat_template": str,
    **{f"tokenizer.ggml.{key}": str for key in ("model", "pre")},
}
LISTS: Mapping[str, type | tuple[type, ...]] = {
    **{f"tokenizer.ggml.{key}": str for key in ("tokens", "merges")},
    **{f"tokenizer.ggml.{key}": int for key in ("token_type", "precompiled_charsmap")},
    "tokenizer.ggml.scores": (int, float),
}
"""Key → type of its elements; all of an array have one type, so the first one tells."""
TOKEN_IDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding"))


def check_types(metadata: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a key whose value is of another type."""
    for key, kind in TYPES.items():
        if key in metadata and not isinstance(metadata[key], kind):
            raise CheckpointError(f"GGUF: {key} must be a {kind.__name__}, got {metadata[key]!r:.80}")
    for key, element in LISTS.items():
        value = metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(first, element) for first in value[:1]):
            word = " or ".join(kind.__name__ for kind in (element if isinstance(element, tuple) else (element,)))
            raise CheckpointError(f"GGUF: {key} must be a list of {word}, got {value!r:.80}")
    for key in TOKEN_IDS:
        token_id(f"GGUF: {key}", metadata.get(key))
