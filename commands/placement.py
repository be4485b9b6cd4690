"""Placement: which linears `quantize` quantises within a limit on perplexity; what each costs alone is a step of its own in the manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil, expm1, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifact.calibration import calibration_file
from artifact.config import LlamaConfig
from artifact.errors import ParityMismatch, QuantizationError, UsageError
from artifact.progress import Progress, silent
from artifact.steps import Outcome, Report, StepContext, run_step
from commands.calibrate import CalibrationOptions, calibrated_text
from commands.placement_model import Model

if TYPE_CHECKING:
    from graphs.quantize.placement import Placement
    from validation.placement_text import PlacementText

DEFAULT_LIMIT_PCT = {"int8-smoothquant": 1.0}
"""Scheme → the limit where none is given; the others quantise every linear of the layers."""


@dataclass(frozen=True)
class PlacementOptions:
    """What decides where quantisation stops.

    Attributes:
        max_perplexity_increase: per cent; None is the scheme's own.
        sensitivity_tokens: that each linear is scored on; None is 512.
    """

    max_perplexity_increase: float | None = None
    sensitivity_tokens: int | None = None

    def __post_init__(self) -> None:
        limit = self.max_perplexity_increase
        if limit is not None and not 0 <= limit < inf:
            raise UsageError(f"--max-perplexity-increase {limit}: a limit is a number of per cent, from 0", hint="--max-perplexity-increase 1")

    @property
    def given(self) -> str | None:
        """The first option that was given, as on the command line."""
        return next((f"--{name.replace('_', '-')}" for name, value in asdict(self).items() if value is not None), None)

    def recorded(self, limit_pct: float | None) -> dict[str, Any]:
        """As a step's options: names of the command line; nothing where there is no limit."""
        return {} if limit_pct is None else asdict(self) | {"max_perplexity_increase": limit_pct}

    def limit_pct(self, scheme: str) -> float | None:
        """The limit of a scheme; None for none."""
        return DEFAULT_LIMIT_PCT.get(scheme) if self.max_perplexity_increase is None else self.max_perplexity_increase


OpenModel = Callable[[], Model]


def score(
    artifact: Path,
    scheme: str,
    graph: str,
    open_model: OpenModel,
    options: PlacementOptions,
    calibration: CalibrationOptions,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Measure what each linear costs alone, on text that was not calibrated on."""
    from graphs.quantize.smoothing_file import SMOOTHED, smoothing_file

    recorded = {"scheme": scheme, "sensitivity_tokens": options.sensitivity_tokens, **calibration.recorded()}

    def work(step: StepContext) -> Report:
        from validation.scoring import score_artifact

        model = open_model()
        text = calibrated_text(artifact, model.reference.config, scheme, calibration)
        forms = model.forms.quantised
        return score_artifact(step, scheme, model.reference, forms, text, model.statistics, tokens=options.sensitivity_tokens)

    inputs = (calibration_file(scheme), graph, *([smoothing_file(scheme)] if scheme in SMOOTHED else []))
    return run_step(artifact, f"sensitivity-{scheme}", recorded, work, inputs=inputs, force=force, progress=progress)


def decide(
    step: StepContext, scheme: str, model: Model, limit_pct: float, options: PlacementOptions, calibration: CalibrationOptions
) -> tuple[dict[str, str], dict[str, Any]]:
    """Choose what is quantised, measured as a whole on text that was neither calibrated nor scored on; writes sensitivity-<scheme>.json.

    Returns:
        The linears that are kept, with the reason of each; and what was tried.

    Raises:
        ParityMismatch: no set of linears keeps within the limit; the message says what came nearest.
    """
    from graphs.quantize.placement import place, reasons
    from graphs.quantize.sensitivities import by_site, describe, linears_of, read_scores, write_sensitivities
    from validation.joint_cost import JointCost

    scores, about = read_scores(step.artifact, scheme)
    text = measured_text(step.artifact, model.reference.config, scheme, options, calibration)
    joint = JointCost(model.reference, text.windows, step.progress)
    sites = by_site(scores)
    found = place(list(sites), limit_pct, lambda chosen: joint.measure(model.forms.of(linears_of(sites, chosen))))
    placement = found.map(lambda chosen: linears_of(sites, chosen))
    if placement.chosen is None:
        raise _not_met(placement, scheme, limit_pct, len(scores), text.name)
    kept = {name: reason for site, reason in reasons(list(sites), found.nearest).items() for name in linears_of(sites, [site])}
    measured = describe(placement, limit_pct, scores) | {"text": text.name, "sha256": text.sha256, "held_out": text.held_out}
    write_sensitivities(step, scheme, scores, kept, about | {"placement": measured})
    return kept, measured


def measured_text(artifact: Path, config: LlamaConfig, scheme: str, options: PlacementOptions, calibration: CalibrationOptions) -> PlacementText:
    """What sets are measured on.

    Raises:
        QuantizationError: the calibration text can't be read, or nothing is left of the committed text.
    """
    from validation.placement_text import choose_text
    from validation.scoring import TOKENS, pieces_of

    text = calibrated_text(artifact, config, scheme, calibration)
    return choose_text(artifact, config, text, pieces_of(text, options.sensitivity_tokens or TOKENS))


def check_placeable(scheme: str, target: str, options: PlacementOptions, plainly: str | None) -> None:
    """Refuse a limit that nothing can be measured for, and options that nothing comes of.

    Raises:
        UsageError: the scheme has no forms, or there is no limit that linears would be scored for.
        QuantizationError: nothing can be calibrated on.
    """
    from validation.forms import FORMS

    known = target == "tensorrt" and scheme in FORMS
    if options.given and not known:
        raise UsageError(f"{options.given} is not for {scheme} for {target}; it is for {', '.join(FORMS)} for tensorrt", hint="leave it out")
    limit_pct = options.limit_pct(scheme)
    if limit_pct is None and options.given:
        raise UsageError(f"{options.given} is for scoring linears, which {scheme} does with a limit", hint="--max-perplexity-increase 1")
    if limit_pct is not None and plainly is not None:
        raise QuantizationError(f"what quantising costs can't be measured: {plainly}", hint="leave out --max-perplexity-increase")


def _not_met(placement: Placement, scheme: str, limit_pct: float, count: int, text: str) -> ParityMismatch:
    from graphs.quantize.placement import GATE, ROOM

    nearest = placement.nearest
    measured = nearest.measured
    found = f"{len(nearest.quantised)} of {count} linears quantised cost {measured.words} on {measured.tokens:,} tokens of {text}"
    needed = ceil(max(100 * expm1(measured.kl * ROOM / GATE), measured.increase_pct) * 100 + 1) / 100
    return ParityMismatch(
        f"{scheme} can't keep within {limit_pct:g} % of perplexity; the nearest: {found}; nothing was written",
        hint=f"--max-perplexity-increase {needed:g} leaves room, or take another --scheme",
    )
