"""This toolkit's INT8 by INT8 at every share of the weights, and without any of its means, for benchmarks/quantization_quality.py."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from quality_rows import Yardstick

from artifact.calibration import calibration_file
from artifact.hashing import plain_sha256, sha256_of
from commands.graphs import SOURCES
from commands.placement_model import Model
from graphs.quantize.int8_smoothquant import SCHEME
from graphs.quantize.linears import site_of
from graphs.quantize.placement import Candidate
from graphs.quantize.sensitivities import read_scores, scores_file
from graphs.quantize.smoothing import unsmoothed
from validation.fake_quant import Form
from validation.joint_cost import JointCost
from validation.perplexity import TokenScores
from validation.sensitivity import Forms

PERCENT = 100


def graph_identity(path: Path) -> str:
    """Of a graph and the weights that were written with it."""
    checksums = path.parent / "weights" / f"{path.stem}-checksums.json"
    return hashlib.sha256(b"".join(file.read_bytes() for file in (path, checksums) if file.is_file())).hexdigest()


def largest_set(candidates: Sequence[Candidate], share: int) -> frozenset[str]:
    """The cheapest by byte, as placement takes them, until at least so many per cent of the bytes are there."""
    total, chosen, taken = sum(one.bytes_saved for one in candidates), set(), 0
    for one in sorted(candidates, key=lambda one: (one.cost / one.bytes_saved, one.name)):
        if taken >= total * share / PERCENT:
            break
        chosen.add(one.name)
        taken += one.bytes_saved
    return frozenset(chosen)


class Curve:
    """Sets of linears of an artifact that ``quantize --scheme int8-smoothquant`` has scored, run in PyTorch as they are rounded in the graph.

    Args:
        artifact: the artifact.
        yardstick: what they are measured on.
    """

    def __init__(self, artifact: Path, yardstick: Yardstick) -> None:
        self._artifact, self._yardstick = artifact, yardstick
        self._candidates = [score.candidate for score in read_scores(artifact, SCHEME)[0]]

    @property
    def calibration(self) -> str:
        """Identity of what was calibrated on."""
        return sha256_of(self._artifact / calibration_file(SCHEME))

    def identity(self, share: int) -> str:
        """Of one set, as it is rounded."""
        return f"{share} {self.calibration} {plain_sha256(self._artifact / scores_file(SCHEME))}"

    def sizes(self, shares: Sequence[int]) -> dict[str, tuple[int, float]]:
        """Name of each row → how many linears, and which part of the bytes they really are."""
        sizes = {one.name: one.bytes_saved for one in self._candidates}
        sets = {f"{share} %": largest_set(self._candidates, share) for share in shares}
        return {name: (len(chosen), sum(map(sizes.__getitem__, chosen)) / sum(sizes.values())) for name, chosen in sets.items()}

    def measure(self, share: int) -> TokenScores:
        """One point of the curve."""
        return self._scores(self._model.forms.of(largest_set(self._candidates, share)))

    def naive(self) -> TokenScores:
        """All linears, one scale an input from the largest value, weights to the nearest level."""
        statistics = self._model.statistics
        scales = {one.name: unsmoothed(statistics.of(site_of(one.name))).activation_scale for one in self._candidates}
        return self._scores({name: Form(activation_scale=scale) for name, scale in scales.items()})

    @cached_property
    def _model(self) -> Model:
        return Model.open(self._artifact, SCHEME, SOURCES["tensorrt"])

    def _scores(self, forms: Forms) -> TokenScores:
        reference = self._model.reference
        states, norm = JointCost(reference, self._yardstick.windows).final_states(forms), reference.final_norm()
        with torch.inference_mode():
            return self._yardstick.measure(lambda index: F.linear(norm(states[index]), reference.lm_head))
