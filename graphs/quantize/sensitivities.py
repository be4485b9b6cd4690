"""The two files of a placement: what each linear costs alone (`scores-<scheme>.json`, measured), and what came of it (`sensitivity-<scheme>.json`).

The first depends on the model and the text, and stays when a limit changes; the second adds what was kept, and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from artifact.errors import QuantizationError
from artifact.steps import StepContext, require
from graphs.quantize.linears import site_of
from graphs.quantize.placement import Candidate, Placement, Try


@dataclass(frozen=True)
class LinearScore:
    """What quantising one linear alone costs and saves.

    Attributes:
        name: module path.
        kind: the same within its layer, without its block: `qkv_proj`.
        mean_kl, kl_se: divergence of a token from the float32 reference, nats, and its standard error.
        bytes_saved: against float16.
        weight_error: relative root mean square error of the weight.
        activation_peak: largest |input| of a channel ÷ the median channel's; None where nothing was measured. Where it is high, spikes live;
            it is a number to read, and decides nothing.
    """

    name: str
    layer: int
    kind: str
    mean_kl: float
    kl_se: float
    bytes_saved: int
    weight_error: float
    activation_peak: float | None

    @property
    def candidate(self) -> Candidate:
        """As placement sees it, where it alone reads its input."""
        return Candidate(self.name, self.mean_kl, self.bytes_saved)


def scores_file(scheme: str) -> str:
    """Where scores lie in the artifact."""
    return f"scores-{scheme}.json"


def write_scores(step: StepContext, scheme: str, scores: Iterable[LinearScore], about: Mapping[str, Any]) -> None:
    """Write what was measured; ``about`` says on what."""
    _write(step, scores_file(scheme), {"scheme": scheme, **about, "linears": [asdict(score) for score in scores]})


def read_scores(artifact: Path, scheme: str) -> tuple[list[LinearScore], dict[str, Any]]:
    """What was measured, and on what.

    Raises:
        ArtifactError: nothing was, or of other weights.
        QuantizationError: the file is not one of scores.
    """
    path = require(artifact, scores_file(scheme))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [LinearScore(**linear) for linear in content.pop("linears")], content
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        hint = f"python cli.py quantize {artifact} --scheme {scheme} --force"
        raise QuantizationError(f"{path} can't be read as scores: {error}", hint=hint) from error


def by_site(scores: Iterable[LinearScore]) -> dict[Candidate, list[str]]:
    """Candidates of placement, and the linears of each: those that read one input go together, for they are smoothed together and share its scale."""
    sites: dict[str, list[LinearScore]] = {}
    for score in scores:
        sites.setdefault(site_of(score.name), []).append(score)
    return {
        Candidate(site, sum(one.mean_kl for one in together), sum(one.bytes_saved for one in together)): [one.name for one in together]
        for site, together in sites.items()
    }


def linears_of(sites: Mapping[Candidate, list[str]], chosen: Iterable[str]) -> frozenset[str]:
    """The linears of the chosen candidates."""
    wanted = frozenset(chosen)
    return frozenset(name for site, names in sites.items() if site.name in wanted for name in names)


def write_sensitivities(step: StepContext, scheme: str, scores: Iterable[LinearScore], kept: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Write every linear with what it costs, whether it was kept, and the reason where it was."""
    linears = [asdict(score) | {"kept": score.name in kept, "reason": kept.get(score.name)} for score in scores]
    _write(step, f"sensitivity-{scheme}.json", {"scheme": scheme, **about, "linears": linears})


def describe(placement: Placement, limit_pct: float, scores: Iterable[LinearScore]) -> dict[str, Any]:
    """For the report: the limit, the choice and all that was tried on the way."""
    saved = {score.name: score.bytes_saved for score in scores}
    total = sum(saved.values())

    def entry(tried: Try) -> dict[str, Any]:
        measured = asdict(tried.measured)
        share = sum(saved[name] for name in tried.quantised) / total
        return {"quantized": len(tried.quantised), "share": share, "budget": tried.budget, **measured, "holds": tried.measured.holds(limit_pct)}

    return {"max_perplexity_increase": limit_pct, "chosen": entry(placement.nearest), "tries": [entry(tried) for tried in placement.tries]}


def _write(step: StepContext, file: str, content: Mapping[str, Any]) -> None:
    with step.write(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
