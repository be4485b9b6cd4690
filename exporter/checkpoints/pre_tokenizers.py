"""How a byte-level BPE splits text before merging, by the name that GGUF gives it (``tokenizer.ggml.pre``).

Source: the regular expressions of the models' own tokenizer.json files; names as in llama.cpp's converter.
"""

from __future__ import annotations

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASED_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CASED_SUFFIXES + r"\p{N}{1,3}" + REST
QWEN2 = CASED_SUFFIXES + r"\p{N}" + REST

SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), (GPT2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2"), (QWEN2,)),
}
"""Name → expressions, applied one after the other, each match a piece of its own."""
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r")
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
"""Names whose BPE takes a word that is in the vocabulary as it is, whatever the merges say."""


def pre_tokenizer(name: str) -> PreTokenizer | None:
    """The pre-tokenizer of a GGUF ``tokenizer.ggml.pre``; None for a name that is not known."""
    if name in DIGIT_BY_DIGIT:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    if name not in SPLITS:
        return None
    splits = [Split(Regex(expression), behavior="isolated") for expression in SPLITS[name]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
