"""The yardstick of benchmarks/quantization_quality.py, and its rows: each is kept in a file when it is measured, so that a later run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from quality_texts import TEXTS
from shapes import ROOT  # noqa: F401  # puts the project on the path
from tokenizers import Tokenizer

from exporter.checkpoints import open_checkpoint
from validation.bootstrap import Resampling
from validation.perplexity import TokenScores, Window
from validation.quality import Judge
from validation.reference import Reference, ReferenceRun
from validation.sensitivity import divergence

WINDOW, BLOCK = 512, 128
Logits = Callable[[int], torch.Tensor]
"""Index of a window → logits [L, V] of a form of the model."""
FIELDS = ("nll", "kl", "best")


@dataclass(frozen=True)
class Yardstick:
    """The tokens, and what the float32 reference says of them."""

    windows: Sequence[Window]
    runs: Sequence[ReferenceRun]

    @property
    def identity(self) -> str:
        """Of the tokens."""
        return hashlib.sha256(b"".join(np.append(window.inputs, window.targets[-1]).tobytes() for window in self.windows)).hexdigest()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [sum(len(window.targets) for window in self.windows if window.text == index) for index in range(len(TEXTS))]

    def judge(self, reference: TokenScores) -> Judge:
        """What rows are held against; errors are of blocks of neighbours drawn again (validation/bootstrap.py)."""
        return Judge(list(TEXTS), Resampling(self.lengths), reference)

    @torch.inference_mode()
    def measure(self, logits: Logits | None = None) -> TokenScores:
        """Scores of a form of the model; of the reference itself without one."""
        parts = [[np.concatenate(side) for side in zip(*self._blocks(index, logits), strict=True)] for index in range(len(self.windows))]
        nll, kl, best = (np.concatenate(side) for side in zip(*parts, strict=True))
        return TokenScores(nll, kl, best, np.full(len(nll), np.nan))

    def _blocks(self, index: int, logits: Logits | None) -> Iterator[list[NDArray[np.float64]]]:
        run, targets = self.runs[index], torch.from_numpy(self.windows[index].targets)
        ours = None if logits is None else logits(index)
        for start in range(0, len(targets), BLOCK):
            rows = slice(start, start + BLOCK)
            exact = torch.nn.functional.linear(run.final_hidden[rows], run.lm_head)
            varied = exact if ours is None else ours[rows].float()
            nll = torch.nn.functional.cross_entropy(varied, targets[rows], reduction="none")
            kl = divergence(exact.softmax(-1), exact, varied.clone())
            best = (varied.argmax(-1) == exact.argmax(-1)).double()
            yield [one.double().numpy() for one in (nll, kl, best)]


def make_yardstick(artifact: Path, tokens: int) -> Yardstick:
    """Windows of three texts, and the reference's run over them on the checkpoint's own weights."""
    tokenizer, checkpoint, each = Tokenizer.from_file(str(artifact / "tokenizer.json")), open_checkpoint("demo"), tokens // len(TEXTS)
    windows = []
    for index, read in enumerate(TEXTS.values()):
        ids = np.asarray(tokenizer.encode(read(), add_special_tokens=False).ids[: each + 1], np.int64)
        windows += [Window(ids[start : start + WINDOW], ids[start + 1 : start + WINDOW + 1], index) for start in range(0, each, WINDOW)]
    return Yardstick(windows, Reference(checkpoint.config, checkpoint.read).run([window.inputs for window in windows], keep_cache=()))


@dataclass(frozen=True)
class Rows:
    """Measured rows, a JSON file each: what they were measured on, and the scores of every token.

    Attributes:
        folder: where they lie.
        yardstick: identity of the tokens.
    """

    folder: Path
    yardstick: str

    def get(self, name: str, identity: str, measure: Callable[[], TokenScores]) -> TokenScores:
        """A row as it was measured on the same tokens and the same form, or measured now."""
        path = self.folder / f"{name.replace(' ', '-').replace('%', 'percent').replace(',', '')}.json"
        made_of = {"name": name, "tokens": self.yardstick, "form": identity}
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if known.get("made_of") != made_of:
            scores = measure()
            known = {"made_of": made_of} | {field: getattr(scores, field).round(9).tolist() for field in FIELDS}
            self.folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".part").write_text(json.dumps(known), encoding="utf-8")
            path.with_suffix(".part").rename(path)
        arrays = [np.asarray(known[field], np.float64) for field in FIELDS]
        return TokenScores(*arrays, np.full(len(arrays[0]), np.nan))
