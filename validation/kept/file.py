"""The reference's predictions as a safetensors file: tokens, what is kept of each position, and which model and texts they are of.

    sequence_ids, sequence_lengths    [sum L], [2 + W] int32: the two sequences of the scenarios, then the W windows of the texts
    targets, scored, text             [sum m], [W], [W] int32: tokens that the windows score, how many each scores, and of which text
    target_logits                     [sum m] float32, the reference's
    top_logits … drawn_ids            [T, …] of ``Predictions``: all positions of the two sequences, then the scored ones of each window
    metadata: llama2trt-reference     JSON: version, sha256 of all tensors, of model and texts too; one entry, because entries are written in no order
The same reference gives the same bytes. Letters: L tokens, m scored tokens, T positions, k best kept, s drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError, ValidationError
from artifact.hashing import sha256_of
from validation.kept.predictions import FIELDS, Predictions
from validation.perplexity import Window

FORMAT, VERSION = "llama2trt-reference", 2
HINT = "python cli.py validate ART --save-reference FILE.safetensors writes one"
TENSORS = ("sequence_ids", "sequence_lengths", "targets", "scored", "text", "target_logits", *FIELDS)
OF_MODEL, OF_TEXT = {"name", "source", "format", "fingerprint", "config"}, {"name", "sha256", "kind", "bos"}
SEQUENCES = 2
"""The main sequence and the padded row's (validation/scenarios.py)."""
Array = NDArray[Any]


@dataclass(frozen=True)
class Kept:
    """What a file holds.

    Attributes:
        model: name, source, fingerprint of the checkpoint.
        texts: name, sha256, kind and bos of each.
        sequences: token ids [L] of the scenarios' two sequences; ``of_sequences`` the reference at all of their positions.
        windows: of the texts; ``of_windows`` the reference at their scored positions, ``target_logits`` its logits of what follows.
    """

    model: Mapping[str, Any]
    config: LlamaConfig
    texts: Sequence[Mapping[str, Any]]
    sequences: list[Array]
    windows: list[Window]
    of_sequences: list[Predictions]
    of_windows: list[Predictions]
    target_logits: Array

    @property
    def positions(self) -> int:
        """Positions that predictions are kept of."""
        return sum(map(len, (*self.of_sequences, *self.of_windows)))

    @property
    def bytes_per_position(self) -> int:
        """Of one position's predictions."""
        first = self.of_sequences[0][:1]
        return sum(getattr(first, name).nbytes for name in FIELDS)


def to_bytes(kept: Kept) -> bytes:
    """The file."""
    ids = [*kept.sequences, *(window.inputs for window in kept.windows)]
    parts = [*kept.of_sequences, *kept.of_windows]
    tensors: dict[str, Array] = {
        "sequence_ids": np.concatenate(ids).astype(np.int32),
        "sequence_lengths": np.array([len(one) for one in ids], np.int32),
        "targets": np.concatenate([np.zeros(0, np.int64), *(window.targets for window in kept.windows)]).astype(np.int32),
        "scored": np.array([len(window.targets) for window in kept.windows], np.int32),
        "text": np.array([window.text for window in kept.windows], np.int32),
        "target_logits": kept.target_logits.astype(np.float32),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS},
    }
    about = {"model": {**kept.model, "config": asdict(kept.config)}, "texts": [dict(text) for text in kept.texts]}
    return save(tensors, {FORMAT: json.dumps({"version": VERSION, "sha256": _digest(tensors, about), **about}, sort_keys=True)})


def read_kept(path: Path) -> Kept:
    """Read a file.

    Raises:
        ValidationError: it can't be read, is no such file or of another version, or its bytes are not those that were written.
    """
    tensors, header = _open(path)
    try:
        about = json.loads(header)
        if about["version"] != VERSION:
            raise ValidationError(f"{path} has version {about['version']}, this release reads {VERSION}", hint="save the reference again")
        if _digest(tensors, {key: about[key] for key in ("model", "texts")}) != about["sha256"]:
            raise ValidationError(
                f"{path} was changed after it was written: its tensors, model or texts are not those of its sha256", hint="save the reference again"
            )
        return _kept(tensors, about)
    except (KeyError, ValueError, TypeError, IndexError, CheckpointError) as error:
        raise ValidationError(f"{path} is not a whole file of predictions: {error}", hint="save the reference again") from error


def describe_kept(path: Path, kept: Kept) -> dict[str, Any]:
    """What the report says of a file."""
    first = kept.of_sequences[0]
    return {
        "file": path.name,
        "sha256": sha256_of(path),
        "positions": kept.positions,
        "bytes_per_position": kept.bytes_per_position,
        "top_k": int(first.top_ids.shape[1]),
        "drawn": int(first.drawn_ids.shape[1]),
        "rest_mass": float(np.mean([np.exp(part.log_rest.astype(np.float64)).mean() for part in (kept.of_windows or kept.of_sequences)])),
    }


def _open(path: Path) -> tuple[dict[str, Array], str]:
    """The tensors and the header's entry; of another file nothing is read."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise ValidationError(f"{path} holds no predictions of a reference: its header has no {FORMAT}", hint=HINT)
            return {name: file.get_tensor(name) for name in TENSORS}, str(metadata[FORMAT])
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a dtype that numpy has not
        raise ValidationError(f"{path} can't be read: {error}", hint=HINT) from error


def _kept(tensors: Mapping[str, Array], about: Mapping[str, Any]) -> Kept:
    model, texts = dict(about["model"]), about["texts"]
    _require_keys("model", model, OF_MODEL)
    for text in texts:
        _require_keys("text", text, OF_TEXT)
    if (named := tensors["text"]).size and not 0 <= named.min() <= named.max() < len(texts):
        raise ValueError(f"windows of text {named.max()}, expected 0 to {len(texts) - 1}")
    ids = _split(tensors["sequence_ids"].astype(np.int64), tensors["sequence_lengths"])
    targets = _split(tensors["targets"].astype(np.int64), tensors["scored"])
    windows = [Window(inputs, scored, int(text)) for inputs, scored, text in zip(ids[SEQUENCES:], targets, tensors["text"], strict=True)]
    sizes = [*map(len, ids[:SEQUENCES]), *map(len, targets)]
    fields = {name: _split(tensors[name], sizes) for name in FIELDS}
    parts = [Predictions(*(fields[name][index] for name in FIELDS)) for index in range(len(sizes))]
    config = LlamaConfig(**model.pop("config"))
    return Kept(model, config, texts, ids[:SEQUENCES], windows, parts[:SEQUENCES], parts[SEQUENCES:], tensors["target_logits"])


def _require_keys(what: str, found: Mapping[str, Any], wanted: set[str]) -> None:
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"a {what} without {', '.join(missing)}")


def _split(array: Array, sizes: Any) -> list[Array]:
    ends = np.cumsum(sizes)
    if len(array) != (ends[-1] if len(ends) else 0):
        raise ValueError(f"{len(array)} rows, expected {ends[-1] if len(ends) else 0}")
    return np.split(array, ends[:-1]) if len(ends) else []


def _digest(tensors: Mapping[str, Array], about: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
