"""How each scheme rounds the linears of a model, as forms that the reference can be run with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from artifact.io_spec import Dtype
from graphs.quantize.statistics import Statistics
from validation.fake_quant import Form
from validation.reference import Reference
from validation.sensitivity import Forms

SCALES: Mapping[Dtype, str] = {"fp16": "float16", "fp32": "float32"}
"""Dtype of an artifact → that of its weight-only scales."""


@dataclass(frozen=True)
class SchemeForms:
    """A scheme's.

    Attributes:
        quantised: of every linear that the scheme can quantise.
        kept: of those that placement keeps out of it; a linear that is not here stays in float.
    """

    quantised: Forms
    kept: Forms

    def of(self, chosen: Iterable[str]) -> Forms:
        """Those of a model in which the chosen ones are quantised, and the others kept."""
        return {**self.kept, **{name: self.quantised[name] for name in chosen}}


MakeForms = Callable[[Reference, Statistics, Iterable[str], Dtype], SchemeForms]


def int8_forms(reference: Reference, statistics: Statistics, names: Iterable[str], dtype: Dtype) -> SchemeForms:
    """Weight-only, by plain rounding: what rounding by data costs is less."""
    return SchemeForms({name: Form(scale_dtype=SCALES[dtype]) for name in names}, {})


FORMS: Mapping[str, MakeForms] = {"int8": int8_forms}
"""Scheme → its forms; of a scheme that is not here nothing can be placed."""
