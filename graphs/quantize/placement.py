"""Which linears are quantised, and which stay as they are and why: the largest set, in bytes saved, that keeps within a limit.

What each linear costs alone is measured before (validation/sensitivity.py). Costs are taken to add up, which says what to try; each try is measured
as a whole, and the next one has a budget that is corrected by what the last one cost. What is chosen was measured; no cost is taken for granted.

A limit of p per cent on perplexity is ln(1 + p/100) nats a token: by so much a token gets less likely. A divergence of as many nats is the same
increase on text that the model itself would write, and has a tenth of the noise, so both must hold. The one limit on divergence is ``gate_of``: a
graph holds it on any text that it is judged on (validation/tolerances.py), and a set one part in ``ROOM`` of it on the text that it is chosen on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log1p

TRIES = 6
CAUTION = 0.95
"""Of what a corrected budget would allow: costs only roughly add up."""
CLOSE, PROBE, SMALLEST_CUT, LARGEST_STEP = 1.05, 1.15, 0.7, 4.0
"""Budgets that need no third between them; by how much one that held grows at least, until one fails, and at most; what is left at most of one that
failed."""

GATE = 2.0
"""Times the limit in nats: a set whose perplexity is at the limit diverges by 1.3 to 1.8 times as many (docs/adr/016)."""
ROOM = 1.6
"""How much further a set may diverge on text that it was not chosen on: 1.3 to 1.5 times as far was measured (docs/adr/016)."""


@dataclass(frozen=True)
class Candidate:
    """A linear that can be quantised.

    Attributes:
        cost: nats that it costs alone.
        bytes_saved: by quantising it.
    """

    name: str
    cost: float
    bytes_saved: int


@dataclass(frozen=True)
class Measured:
    """What a set of quantised linears costs together.

    Attributes:
        kl: mean divergence of a token from the float32 reference, nats.
        increase_pct, increase_se_pct: of perplexity, with its paired standard error.
        tokens: that were scored.
        kl_se: standard error of ``kl``.
    """

    kl: float
    increase_pct: float
    increase_se_pct: float
    tokens: int
    kl_se: float = 0.0

    def holds(self, limit_pct: float) -> bool:
        """Whether it is within a limit on perplexity's increase."""
        return self.kl <= gate_of(limit_pct) / ROOM and self.increase_pct <= limit_pct

    @property
    def words(self) -> str:
        """``+0.31 ± 0.12 %, KL 0.0024``."""
        return f"{self.increase_pct:+.2f} ± {self.increase_se_pct:.2f} %, KL {self.kl:.2g}"


@dataclass(frozen=True)
class Try:
    """A set that was measured.

    Attributes:
        budget: nats that the costs of its linears add up to at most.
    """

    quantised: frozenset[str]
    budget: float
    measured: Measured


@dataclass(frozen=True)
class Placement:
    """What was chosen.

    Attributes:
        chosen: the largest set that holds; None where none does.
        tries: all that was measured, in order.
    """

    chosen: Try | None
    tries: tuple[Try, ...]

    @property
    def nearest(self) -> Try:
        """The chosen one; or else the one that cost least, with something quantised where that was tried."""
        return self.chosen or min(self.tries[1:] or self.tries, key=lambda one: one.measured.kl)

    def map(self, names: Callable[[frozenset[str]], frozenset[str]]) -> Placement:
        """The same with other names of what is quantised."""
        tries = tuple(replace(one, quantised=names(one.quantised)) for one in self.tries)
        return Placement(None if self.chosen is None else tries[self.tries.index(self.chosen)], tries)


def nats_of(limit_pct: float) -> float:
    """A limit on perplexity's increase, in nats a token."""
    return log1p(limit_pct / 100)


def gate_of(limit_pct: float) -> float:
    """The largest mean divergence, in nats, that a graph may have that was placed within a limit."""
    return GATE * nats_of(limit_pct)


def choose(candidates: Sequence[Candidate], budget: float) -> frozenset[str]:
    """The cheapest by byte, then the next, as far as the costs add up to no more than ``budget``; what is too dear is passed over."""
    chosen, spent = set(), 0.0
    for candidate in sorted(candidates, key=lambda one: (one.cost / one.bytes_saved, one.name)):
        if spent + candidate.cost <= budget:
            chosen.add(candidate.name)
            spent += candidate.cost
    return frozenset(chosen)


def place(candidates: Sequence[Candidate], limit_pct: float, measure: Callable[[frozenset[str]], Measured]) -> Placement:
    """Find the largest set that holds, in at most ``TRIES`` measurements beside that of the empty set.

    Args:
        candidates: what can be quantised, with what it costs alone.
        limit_pct: largest increase of perplexity.
        measure: what a set costs as a whole; of the empty set, what is paid where nothing is quantised as it might be.
    """
    nothing = Try(frozenset(), 0.0, measure(frozenset()))
    tries = [nothing]
    allowed = gate_of(limit_pct) / ROOM - nothing.measured.kl
    budget = allowed
    while nothing.measured.holds(limit_pct) and len(tries) <= TRIES and (budget > 0 or tries == [nothing]):
        chosen, budget = _next_set(candidates, budget, tries)
        if any(one.quantised == chosen for one in tries):
            break
        tries.append(Try(chosen, budget, measure(chosen)))
        holding = [one.budget for one in tries[1:] if one.measured.holds(limit_pct)]
        failing = [one.budget for one in tries[1:] if not one.measured.holds(limit_pct)]
        if len(chosen) == len(candidates) and not failing:
            break
        budget = _next_budget(tries[-1], allowed, nothing.measured.kl, max(holding, default=None), min(failing, default=None))
    sizes = {candidate.name: candidate.bytes_saved for candidate in candidates}
    within = [one for one in tries if one.quantised and one.measured.holds(limit_pct)]
    return Placement(max(within, key=lambda one: sum(map(sizes.__getitem__, one.quantised)), default=None), tuple(tries))


def _next_set(candidates: Sequence[Candidate], budget: float, tries: Sequence[Try]) -> tuple[frozenset[str], float]:
    """What a budget chooses, at least the cheapest; as long as that is the largest that was tried, what a larger one does, and that budget."""
    cheapest = frozenset({min(candidates, key=lambda one: one.cost).name})
    largest = max((one.quantised for one in tries), key=len)
    chosen = choose(candidates, budget) or cheapest
    while chosen == largest and len(chosen) < len(candidates):
        budget *= PROBE
        chosen = choose(candidates, budget) or cheapest
    return chosen, budget


def reasons(candidates: Sequence[Candidate], tried: Try) -> dict[str, str]:
    """Every candidate that is not in a set → why not, with its number."""
    kept = [one for one in candidates if one.name not in tried.quantised]
    if tried.budget <= 0:
        return {one.name: "nothing may be lost" for one in kept}
    return {one.name: f"alone it costs {one.cost:.2g} nats, {one.cost / tried.budget:.0%} of what all may" for one in kept}


def _next_budget(last: Try, allowed: float, paid: float, holds: float | None, fails: float | None) -> float:
    """Between what held and what failed, or where the last try's real cost says; 0 where no more is to be gained."""
    if holds is not None and fails is not None:
        return (holds * fails) ** 0.5 if fails > holds * CLOSE else 0.0
    real = max(last.measured.kl - paid, allowed / LARGEST_STEP)
    step = CAUTION * allowed / real
    if holds is not None:
        return last.budget * max(step, PROBE)
    return last.budget * min(step, SMALLEST_CUT)
