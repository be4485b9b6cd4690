"""Levels and scales that came with the checkpoint, in the place of rounding: the graph holds the integers that the user's own tool chose.

The float weight of the artifact is level × scale, rounded to its dtype once; dividing by the scale and rounding gives the level again. How far
that division is from a whole number is looked at, so that a weight which is not of these scales is refused and never rounded.
A packed linear takes its members' scales one after the other; it is quantised where all of them are. Their static input scales are equal where one
tool measured one input; where they differ the largest is taken, as vLLM does: nothing clips that did not, and no integer of a weight depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from artifact.errors import QuantizationError
from artifact.given import GIVEN_FILE, INPUT_SCALE, WEIGHT_SCALE, Given, given_of
from artifact.layout import members
from artifact.manifest import export_command, read_manifest
from graphs.quantize.rounder import Errors, Rounder
from graphs.quantize.rounding import Grid, Levels
from graphs.quantize.writer import row_blocks

Floats = NDArray[np.float32]
NOT_GIVEN = "float in the checkpoint, it or a linear that is packed with it"
WHOLE = 1 / 6
"""How far from a whole number a level may be found: float16 moves it by at most 1/8, and the division by less than the rest."""
SCALE_ERROR = 1 / 4
"""How many levels the largest level may be moved by a scale's rounding to the artifact's dtype."""


@dataclass(frozen=True)
class GivenScales:
    """The scales of an artifact whose checkpoint was quantised.

    Attributes:
        artifact: the folder.
        given: what the quantisation is.
        names: the tensors of its file of scales.
    """

    artifact: Path
    given: Given
    names: frozenset[str]

    def covers(self, module: str) -> bool:
        """Whether every member of a linear has levels."""
        return all(f"{member}.{WEIGHT_SCALE}" in self.names for member in members(module))

    def scales(self, module: str) -> Floats:
        """Scales of a linear; [out, groups]."""
        return np.concatenate([self._read(f"{member}.{WEIGHT_SCALE}") for member in members(module)])

    def input_scale(self, module: str) -> float | None:
        """The static scale of a linear's input; None where it has none."""
        names = [name for member in members(module) if (name := f"{member}.{INPUT_SCALE}") in self.names]
        return max((float(self._read(name)[0]) for name in names), default=None)

    def levels(self, weight: NDArray[Any], name: str) -> tuple[NDArray[np.int8], Floats]:
        """Levels [out, in] and scales [out, groups], float32 as they came, of a linear's weight [out, in].

        Raises:
            QuantizationError: the weight is not level × scale.
        """
        used = weight.any(axis=1, keepdims=True)  # a row of zeros has any scale: what a tool gave it may be too small to be stored
        scales, levels = np.where(used, self.scales(name), np.float32(1)), np.empty(weight.shape, np.int8)
        for rows, floats in row_blocks(weight, name):
            levels[rows] = to_levels(floats, scales[rows], self.given, name)
        return levels, scales

    def _read(self, name: str) -> Floats:
        with safe_open(str(self.artifact / GIVEN_FILE), framework="numpy") as file:
            found: Floats = file.get_tensor(name)
        return found


@dataclass
class GivenRounder(Rounder):
    """Gives what the checkpoint brought, where another rounder would round."""

    given: GivenScales | None = None

    def round(self, weight: NDArray[Any], name: str, grid: Grid) -> tuple[Levels, Floats]:
        """Levels [out, in] and scales [out, b] of a linear; a group of the checkpoint is one block of the grid, or several with one scale.

        Raises:
            QuantizationError: the weight is not level × scale, or a scale is too small for the weight's dtype.
        """
        assert self.given is not None
        levels, groups = self.given.levels(weight, name)
        given, blocks = self.given.given, np.arange(grid.blocks(weight.shape[1]))
        exact = groups[:, blocks * grid.block_size // given.group_size] if given.group_size else np.repeat(groups, len(blocks), axis=1)
        scales = np.ascontiguousarray(stored_scales(exact, weight.dtype, given.bits, name), np.float32)
        errors = self.errors[name] = Errors()
        for rows, floats in row_blocks(weight, name):
            errors.weight += float(np.square(floats).sum())
            errors.weight_error += float(np.square(levels[rows] * grid.spread(scales[rows], weight.shape[1]) - floats).sum())
        return levels, scales


def given_scales(artifact: Path) -> GivenScales | None:
    """What an artifact's checkpoint brought; None where it was not quantised.

    Raises:
        QuantizationError: the file is gone.
    """
    model = read_manifest(artifact)["model"]
    given = given_of(model)
    if given is None:
        return None
    if not (artifact / GIVEN_FILE).is_file():
        raise QuantizationError(f"{artifact} has no {GIVEN_FILE}", hint=export_command(artifact, model))
    with safe_open(str(artifact / GIVEN_FILE), framework="numpy") as file:
        return GivenScales(artifact, given, frozenset(file.keys()))


def check_scheme(artifact: Path, scheme: str, target: str) -> None:
    """An artifact of a quantised checkpoint can be given the scheme that the checkpoint is for, and no other.

    Raises:
        QuantizationError: another scheme or target was asked for.
    """
    given = given_of(read_manifest(artifact)["model"])
    if given is None:
        return
    if given.scheme != scheme:
        other = f"quantize {artifact} --scheme {given.scheme}" if given.scheme is not None else f"build {artifact} --precision fp16"
        hint = f"python cli.py {other} computes what the checkpoint is; its unquantised original can be given any scheme"
        raise QuantizationError(f"the checkpoint was quantised already ({given.words}): {scheme} would round its weights a second time", hint=hint)
    if target != "tensorrt":
        hint = f"python cli.py quantize {artifact} --scheme {scheme}"
        raise QuantizationError(f"the integers of a quantised checkpoint are taken for the target tensorrt, not for {target}", hint=hint)


def to_levels(weight: Floats, scales: Floats, given: Given, name: str) -> NDArray[np.int8]:
    """The levels that made a weight.

    Args:
        weight: some rows [n, in].
        scales: theirs [n, groups].
        given: how many bits a level has, and how many of a row share a scale.
        name: the linear, for the message.

    Raises:
        QuantizationError: a weight is no level × scale.
    """
    quotients = weight / (np.repeat(scales, given.group_size, axis=1)[:, : weight.shape[1]] if given.group_size else scales)
    levels = np.rint(quotients)
    worst = float(np.abs(quotients - levels).max(initial=0.0))
    below, above = float(levels.min(initial=0.0)), float(levels.max(initial=0.0))
    highest = 1 << (given.bits - 1)
    if not worst <= WHOLE:  # NaN too
        raise QuantizationError(f"{name}.weight is not int{given.bits} × the checkpoint's scales: a value lies {worst:.2g} of a scale beside one")
    if below < -highest or above >= highest:
        raise QuantizationError(f"{name}.weight is not int{given.bits} × the checkpoint's scales: its levels are {below:.0f} … {above:.0f}")
    found: NDArray[np.int8] = levels.astype(np.int8)
    return found


def stored_scales(scales: Floats, dtype: np.dtype[Any], bits: int, name: str) -> NDArray[Any]:
    """Scales in the artifact's dtype, to the nearest; float16 and nearly all bfloat16 ones lose nothing.

    Raises:
        QuantizationError: rounding a scale would move its largest level by a quarter of one, or more.
    """
    stored = scales.astype(dtype)
    moved = np.abs(stored.astype(np.float32) - scales) * (1 << (bits - 1)) / scales
    if not np.isfinite(stored).all() or moved.max(initial=0.0) > SCALE_ERROR:
        row = int(moved.max(axis=1).argmax())
        raise QuantizationError(f"{name}: the scale {scales[row].min():.3g} of row {row} is too small for {dtype}", hint="export with --dtype fp32")
    return stored
