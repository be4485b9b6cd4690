"""The text that sets of linears are measured on: pieces of the calibration text that were neither calibrated nor scored on.

So the texts that ``validate`` scores have no part in what is chosen. Where the calibration text has too few pieces left, the committed text stands
in for them; the report names it, and ``validate`` says that it is no proof there (calibrated_on.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from artifact.config import LlamaConfig
from artifact.errors import QuantizationError
from validation.calibration_text import CalibrationText, Ids
from validation.perplexity import WINDOW, Window, make_windows
from validation.text import load_tokens

TOKENS, LEAST_TOKENS = 4096, 1024
"""That sets are measured on, and fewer than which say too little."""


@dataclass(frozen=True)
class PlacementText:
    """What sets are measured on.

    Attributes:
        windows: each from position 0.
        name, sha256: of the file.
        held_out: whether it is what was left of the calibration text.
    """

    windows: tuple[Window, ...]
    name: str
    sha256: str
    held_out: bool


def choose_text(artifact: Path, config: LlamaConfig, text: CalibrationText, scored: int) -> PlacementText:
    """Take whole pieces that are left, or else the committed text.

    Args:
        artifact: its tokenizer is used.
        config: of the model.
        text: what was calibrated on.
        scored: tokens that single linears are scored on.

    Raises:
        QuantizationError: too little is left of a calibration text that is the committed one.
    """
    pieces = left_over(text, scored)
    if sum(len(piece) - 1 for piece in pieces) >= LEAST_TOKENS:
        return PlacementText(tuple(Window(piece[:-1], piece[1:]) for piece in pieces), text.name, text.sha256, held_out=True)
    tokens = load_tokens(artifact, config, None, TOKENS + 1)
    if tokens.sha256 == text.sha256:
        used = f"{tokens.name} was calibrated on; a set measured on it would look cheaper than it is"
        raise QuantizationError(used, hint="a smaller --calibration-tokens leaves some of it, or --calibration FILE with another text")
    windows = make_windows(tokens.ids, TOKENS, min(WINDOW, config.max_position_embeddings), tokens.bos)
    return PlacementText(tuple(windows), tokens.name, tokens.sha256, held_out=False)


def left_over(text: CalibrationText, scored: int) -> list[Ids]:
    """Pieces of full length behind those that single linears are scored on, as far as ``TOKENS`` go; they lie all over the text."""
    length = max(map(len, text.sequences))
    whole = [ids for ids in text.rest if len(ids) == length]
    return whole[scored : scored + -(-TOKENS // max(length - 1, 1))]
