"""What the search of smoothing found, kept in the artifact: `smoothing-<scheme>.npz`. Another limit searches nothing again from the same statistics.

Of each site: its vector s [in] float32, and under ``<site>:numbers`` the others of ``Smoothing`` [6] float64, NaN where α is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from artifact.errors import QuantizationError
from artifact.steps import StepContext, require
from graphs.quantize.smoothing import Smoothing

SMOOTHED = ("int8-smoothquant",)
"""Schemes that move outliers from inputs into weights."""
NUMBERS = ("activation_scale", "alpha", "headroom", "error", "first_error", "plain_error")
NUMBERS_OF = ":numbers"


def smoothing_file(scheme: str) -> str:
    """Where it lies in the artifact."""
    return f"smoothing-{scheme}.npz"


def write_smoothing(step: StepContext, scheme: str, found: Mapping[str, Smoothing]) -> dict[str, Any]:
    """Write what was found.

    Returns:
        file, sites, alphas (how often each was chosen).
    """
    arrays: dict[str, Any] = {}
    for site, one in found.items():
        numbers = [getattr(one, name) for name in NUMBERS]
        arrays |= {site: one.vector, site + NUMBERS_OF: np.array([np.nan if number is None else number for number in numbers], np.float64)}
    with step.write(smoothing_file(scheme)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    chosen = [str(one.alpha) for one in found.values()]
    return {"file": smoothing_file(scheme), "sites": len(found), "alphas": {alpha: chosen.count(alpha) for alpha in sorted(set(chosen))}}


def read_smoothing(artifact: Path, scheme: str) -> dict[str, Smoothing]:
    """Site → what was found.

    Raises:
        ArtifactError: nothing was, or of other weights.
        QuantizationError: the file is not one of smoothing.
    """
    path = require(artifact, smoothing_file(scheme))
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {site: _smoothing(arrays[site], arrays[site + NUMBERS_OF]) for site in arrays.files if not site.endswith(NUMBERS_OF)}
    except (OSError, EOFError, TypeError, ValueError, KeyError, BadZipFile) as error:
        hint = f"python cli.py quantize {artifact} --scheme {scheme} --force"
        raise QuantizationError(f"{path} can't be read as smoothing: {error}", hint=hint) from error


def _smoothing(vector: Any, numbers: Any) -> Smoothing:
    scale, alpha, *others = (float(number) for number in numbers)
    return Smoothing(vector.astype(np.float32), scale, None if np.isnan(alpha) else alpha, *others)
