"""How each scheme rounds the linears of a model, as forms that the reference can be run with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifact.io_spec import Dtype
from artifact.layout import members
from artifact.progress import Progress, silent
from graphs.quantize.linears import site_of
from graphs.quantize.rounder import Rounder
from graphs.quantize.smoothing import Smoothing, smooth
from graphs.quantize.statistics import Divided, Statistics
from validation.fake_quant import Form
from validation.reference import Reference
from validation.rounded_once import RoundedOnce
from validation.sensitivity import Forms

SCALES: Mapping[Dtype, str] = {"fp16": "float16", "fp32": "float32"}
"""Dtype of an artifact → that of its weight-only scales."""


@dataclass(frozen=True)
class SchemeForms:
    """A scheme's.

    Attributes:
        quantised: of every linear that the scheme can quantise.
        kept: of those that placement keeps out of it; a linear that is not here stays in float.
        smoothing: site → what was searched on the way, for the scheme itself.
    """

    quantised: Forms
    kept: Forms
    smoothing: Mapping[str, Smoothing] | None = None

    def of(self, chosen: Iterable[str]) -> Forms:
        """Those of a model in which the chosen ones are quantised, and the others kept."""
        return {**self.kept, **{name: self.quantised[name] for name in chosen}}


Found = Mapping[str, Smoothing]
MakeForms = Callable[[Reference, Statistics, Iterable[str], Dtype, Found], SchemeForms]


def int8_forms(reference: Reference, statistics: Statistics, names: Iterable[str], dtype: Dtype, found: Found) -> SchemeForms:
    """Weight-only."""
    rounding = RoundedOnce(Rounder(statistics), SCALES[dtype], statistics.path.parent)
    return SchemeForms({name: Form(rounding=rounding, scale_dtype=SCALES[dtype]) for name in names}, {})


def smoothquant_forms(reference: Reference, statistics: Statistics, names: Iterable[str], dtype: Dtype, found: Found) -> SchemeForms:
    """Weights by output channel and inputs by one scale, after smoothing; what is kept is weight-only."""
    chosen = list(names)
    smoothed = Divided(statistics, {site: one.vector for site, one in found.items()})
    rounding = RoundedOnce(Rounder(smoothed), "float32", statistics.path.parent)
    forms = {name: Form(found[site_of(name)].vector, found[site_of(name)].activation_scale, rounding) for name in chosen}
    return SchemeForms(forms, int8_forms(reference, statistics, chosen, dtype, found).quantised, found)


def search_sites(reference: Reference, statistics: Statistics, names: Iterable[str], progress: Progress = silent) -> dict[str, Smoothing]:
    """What smooths the inputs of these linears, by site: the long search."""
    sites = dict.fromkeys(site_of(name) for name in names)
    return smooth(reference.config, statistics, sites, lambda site: _weights(reference, site), progress)


def _weights(reference: Reference, site: str) -> NDArray[Any]:
    """[out, in] of all linears that read a site, one above the other."""
    return np.concatenate([reference.read(f"{member}.weight").numpy() for member in members(site)])


FORMS: Mapping[str, MakeForms] = {"int8": int8_forms, "int8-smoothquant": smoothquant_forms}
"""Scheme → its forms; of a scheme that is not here nothing can be placed."""
