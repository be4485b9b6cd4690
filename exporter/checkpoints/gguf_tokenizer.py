"""Build tokenizer.json and tokenizer_config.json from a GGUF file's metadata, so that Hugging Face's AutoTokenizer opens the folder.

Two kinds: ``gpt2``, byte-level BPE with stored merges, and ``llama``, SentencePiece BPE with scores.
Token types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

from exporter.checkpoints.pre_tokenizers import WHOLE_WORDS, pre_tokenizer
from exporter.checkpoints.sentencepiece_merges import merges_from_scores

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPACE = "\u2581"
"""SentencePiece's visible space."""
SPECIAL_IDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
ADDS_BOS = {"llama": True, "gpt2": False}
"""Whether text starts with the bos token where the file does not say."""


class _Unsupported(Exception):
    """Why no tokenizer can be built; becomes a note, because the weights are fine without one."""


def tokenizer_files(metadata: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """File name → text of the tokenizer files, and notes; no files where the tokenizer is of a kind that is not known."""
    try:
        tokenizer = build_tokenizer(metadata)
    except _Unsupported as reason:
        return {}, [f"no tokenizer written: {reason}"]
    config = json.dumps(_tokenizer_config(metadata), indent=2, ensure_ascii=False)
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": config + "\n"}, []


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file; token ids are the rows of the embedding."""
    kind = metadata.get("tokenizer.ggml.model")
    builders: dict[Any, Callable[[Mapping[str, Any]], Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise _Unsupported(f"tokenizer.ggml.model is {kind!r}; known: {', '.join(builders)}")
    _check_lists(metadata)
    tokenizer = builders[kind](metadata)
    _add_tokens(tokenizer, metadata)
    _add_template(tokenizer, metadata)
    return tokenizer


def _check_lists(metadata: Mapping[str, Any]) -> None:
    tokens = _tokens(metadata)
    if not tokens or len(set(tokens)) != len(tokens):
        raise _Unsupported(f"tokenizer.ggml.tokens holds {len(tokens)} tokens, {len(set(tokens))} of them different")
    for key in ("token_type", "scores"):
        listed = metadata.get(f"tokenizer.ggml.{key}")
        if listed is not None and len(listed) != len(tokens):
            raise _Unsupported(f"tokenizer.ggml.{key} has {len(listed)} entries for {len(tokens)} tokens")
    for token_id in (metadata.get(f"tokenizer.ggml.{key}") for key in SPECIAL_IDS.values()):
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise _Unsupported(f"special token id {token_id} is not in the vocabulary of {len(tokens)}")


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    splitter = pre_tokenizer(name)
    if splitter is None:
        raise _Unsupported(f"tokenizer.ggml.pre {name!r} is not known; how it splits text can't be guessed")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    tokenizer = Tokenizer(_bpe(metadata, merges, ignore_merges=name in WHOLE_WORDS))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens, scores = _tokens(metadata), metadata.get("tokenizer.ggml.scores")
    if scores is None:
        raise _Unsupported("tokenizer.ggml.scores is missing")
    if len(metadata.get("tokenizer.ggml.precompiled_charsmap", ())):
        raise _Unsupported("tokenizer.ggml.precompiled_charsmap: text normalisation by table is not supported")
    normal = {token: score for token, score, kind in zip(tokens, scores, _types(metadata), strict=True) if kind == NORMAL}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(_bpe(metadata, merges_from_scores(normal), byte_fallback=True, fuse_unk=True, unk_token=unknown))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", 1, 0)] if prefix else decode)
    return tokenizer


def _bpe(metadata: Mapping[str, Any], merges: list[Any], **options: Any) -> models.BPE:
    vocab = {token: token_id for token_id, token in enumerate(_tokens(metadata))}
    for merge in merges:
        if len(merge) != 2 or merge[0] not in vocab or merge[1] not in vocab or "".join(merge) not in vocab:
            raise _Unsupported(f"merge {' '.join(merge)!r} is not of tokens in the vocabulary")
    return models.BPE(vocab=vocab, merges=merges, **options)


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    for token, kind in zip(_tokens(metadata), _types(metadata), strict=True):
        if kind in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _add_template(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    config = _tokenizer_config(metadata)
    before = [config["bos_token"]] if config["add_bos_token"] and "bos_token" in config else []
    after = [config["eos_token"]] if config["add_eos_token"] and "eos_token" in config else []
    if before or after:
        used = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(before + after)]
        pair = [*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)]
        tokenizer.post_processor = TemplateProcessing(single=[*before, "$A", *after], pair=pair, special_tokens=used)


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = _tokens(metadata)
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in SPECIAL_IDS.items()}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None}
    config["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", ADDS_BOS[metadata["tokenizer.ggml.model"]]))
    config["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    if "llama.context_length" in metadata:
        config["model_max_length"] = metadata["llama.context_length"]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    return list(metadata.get("tokenizer.ggml.tokens", ()))


def _types(metadata: Mapping[str, Any]) -> list[int]:
    return list(metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(_tokens(metadata)))
