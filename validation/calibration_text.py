"""The sequences that activations are measured on: documents of a text, cut, and pieces taken from all over it.

A plain text is one document; of a .jsonl file every line `{"text": …}` is one. Each sequence begins with BOS where the tokenizer puts it, as
the model's input does. The text that comes with this package is not the one that perplexity is measured on.
Letters: L tokens of a sequence.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.errors import QuantizationError
from artifact.hashing import sha256_of
from validation.text import TOKENIZER, bos_of, open_tokenizer

Ids = NDArray[np.int64]
DEFAULT = Path(__file__).parent / "texts" / "calibration.jsonl"
LENGTH = 256
SHORTEST = 2
"""Tokens of a sequence: one at position 0, and one that is not."""
READ_BYTES = 1 << 22
"""What is read of a long text, from its start."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON may escape what UTF-8 can't hold."""
GOLDEN = (5**0.5 - 1) / 2
FORMS = '--calibration FILE takes a UTF-8 text, or a .jsonl file of lines like {"text": "…"}'


@dataclass(frozen=True)
class CalibrationText:
    """What was chosen.

    Attributes:
        sequences: token ids [L] each, in the order of the text, BOS first where there is one.
        bos: the id that starts each, or None.
        name, sha256: of the file.
        documents: how many were read.
        rest: the pieces that were not chosen, likewise from all over the text: something to try what was made of the others on.
    """

    sequences: tuple[Ids, ...]
    bos: int | None
    name: str
    sha256: str
    documents: int
    rest: tuple[Ids, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, BOS included."""
        return sum(map(len, self.sequences))


def load_sequences(artifact: Path, config: LlamaConfig, source: Path | None = None, *, tokens: int, length: int | None = None) -> CalibrationText:
    """Cut a text into sequences.

    Args:
        artifact: its ``tokenizer.json`` is used.
        config: for the vocabulary, BOS and the longest sequence.
        source: a UTF-8 text or a .jsonl file; None is the text that comes with this package.
        tokens: of all sequences together.
        length: of a sequence; None is 256, or what the model can read.

    Raises:
        QuantizationError: the text can't be read, is empty, too short, not UTF-8, or of another vocabulary; a line is not JSON; a sequence would be
            longer than the model reads.
        ValidationError: the tokenizer can't be read.
    """
    longest = config.max_position_embeddings
    if length is not None and length > longest:
        raise QuantizationError(f"--calibration-length {length}: the model reads at most {longest} tokens", hint=f"--calibration-length {longest}")
    size, path = length or min(LENGTH, longest), source or DEFAULT
    tokenizer = open_tokenizer(artifact / TOKENIZER)
    bos = bos_of(tokenizer, config)
    documents = read_documents(path)
    encoded = [np.asarray(one.ids, np.int64) for one in tokenizer.encode_batch(documents, add_special_tokens=False)]
    largest = max((int(ids.max()) for ids in encoded if len(ids)), default=-1)
    if largest >= config.vocab_size:
        found = f"token {largest}, the model's vocabulary has {config.vocab_size}"
        raise QuantizationError(f"{artifact / TOKENIZER} gives {found}: it belongs to another model", hint="export the checkpoint again")
    pieces = [piece for ids in encoded for piece in _cut(ids, size, bos)]
    chosen, rest = _take(pieces, tokens, path.name)
    return CalibrationText(chosen, bos, path.name, sha256_of(path), len(documents), rest)


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, as far as its first ``READ_BYTES`` go.

    Raises:
        QuantizationError: missing, not UTF-8, a malformed line, or nothing in it.
    """
    try:
        with path.open("rb") as file:
            content, rest = file.read(READ_BYTES), file.read(1)
    except OSError as error:
        raise QuantizationError(f"{path} can't be read: {error.strerror}", hint=FORMS) from error
    lines_only = path.suffix == ".jsonl"
    if rest and lines_only:
        content = content[: content.rfind(b"\n") + 1]
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(content, final=not rest)
    except UnicodeDecodeError as error:
        raise QuantizationError(f"{path} is not UTF-8 (byte {error.start})", hint=f"iconv -t UTF-8 {path.name}") from error
    documents = [document for document in (_lines(path, text) if lines_only else [text]) if document.strip()]
    if not documents:
        raise QuantizationError(f"{path} is empty", hint=FORMS)
    return documents


def _lines(path: Path, text: str) -> Iterator[str]:
    """The ``text`` of every line; empty lines are passed over."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise QuantizationError(f"{path.name}, line {number} is not JSON: {error}", hint=FORMS) from error
        document = record.get("text") if isinstance(record, dict) else None
        if not isinstance(document, str):
            raise QuantizationError(f'{path.name}, line {number} has no "text" that is a string', hint=FORMS)
        if _LONE_SURROGATE.search(document):
            raise QuantizationError(f"{path.name}, line {number} escapes half a character, which is not UTF-8", hint=FORMS)
        yield document


def _cut(ids: Ids, length: int, bos: int | None) -> Iterator[Ids]:
    """A document's pieces of ``length`` tokens, BOS among them; the last may be shorter."""
    before: list[int] = [] if bos is None else [bos]
    step = length - len(before)
    for start in range(0, len(ids), step):
        piece = np.asarray([*before, *ids[start : start + step]], np.int64)
        if len(piece) >= SHORTEST:
            yield piece


def _take(pieces: list[Ids], tokens: int, name: str) -> tuple[tuple[Ids, ...], tuple[Ids, ...]]:
    """Pieces from all over the text that have ``tokens`` tokens together, in its order, the last one chosen cut; and the others."""
    total = sum(map(len, pieces))
    if total < tokens:
        fewer = f", or --calibration-tokens {total}; {total * 2 // 3} leave some of it to measure on, where linears are placed"
        hint = f"give a longer text{fewer if total >= SHORTEST else ''}"
        raise QuantizationError(f"{name} has {total} tokens, {tokens} are needed for calibration", hint=hint)
    chosen: dict[int, Ids] = {}
    order = list(_spread(len(pieces)))
    for index in order:
        chosen[index] = pieces[index][:tokens]
        tokens -= len(chosen[index])
        if not tokens:
            break
    return tuple(chosen[index] for index in sorted(chosen)), tuple(pieces[index] for index in order[len(chosen) :])


def _spread(count: int) -> Iterator[int]:
    """Every index below ``count`` once, so that the first few of them, however many, lie evenly: by the golden section."""
    seen: set[int] = set()
    turn = 0
    while len(seen) < count:
        index = int(turn * GOLDEN % 1 * count)
        if index not in seen:
            seen.add(index)
            yield index
        turn += 1
