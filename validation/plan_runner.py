"""Run a plan over the scenarios, as ``GraphRunner`` runs its graph: the same calls, one position a call.

Letters: B batch, L tokens, V vocab.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.io_spec import Dtype
from engines.plan import Plan, PlanChain
from engines.runner import PlanSession
from validation.calls import FORMS
from validation.row_result import Array, RowResult, row_results
from validation.scenarios import Scenario


class PlanRunner:
    """A plan with the contract's inputs and outputs, on the GPU.

    Args:
        plan: loaded.
        config, dtype: the model it is.
    """

    one_position = True

    def __init__(self, plan: Plan | PlanChain, config: LlamaConfig, dtype: Dtype) -> None:
        self.name = plan.name
        self._form = FORMS["static" if plan.capacity else "dynamic"]
        self._plan, self._config, self._dtype = plan, config, dtype
        ranges = plan.axes["prefill"]
        self.rows, self.capacity = ranges[io_spec.BATCH][2], plan.capacity
        self.positions = plan.capacity or ranges[io_spec.TOTAL][2]

    def admits(self, scenario: Scenario) -> bool:
        """Whether the plan's profiles have rows and positions enough."""
        return len(scenario.rows) <= self.rows and scenario.width <= self.positions

    def too_small_for(self, what: str) -> str:
        """Why something is left out that the plan does not admit."""
        return f"built for {self.rows} row{'s' if self.rows > 1 else ''} of {self.positions} positions, too few for {what}"

    def run(self, scenario: Scenario) -> list[RowResult]:
        """All calls of a scenario; one result per row, with the caches.

        Raises:
            EngineError: the plan admits fewer rows or positions, or the run failed.
        """
        calls = list(self._form.calls(scenario.turns()))
        length = max(call.in_use for call in calls)
        with PlanSession(self._plan, self._config, self._dtype, batch=len(scenario.rows), length=length) as session:
            logits = [session.call(call.inputs()) for call in calls]
            caches = session.caches()
        return row_results(scenario, logits, caches, self._form.padding)

    def logits(self, ids: NDArray[np.int64]) -> Array:
        """Logits [L, V] of one sequence, one decode step a token: the only way to have all of them from a plan."""
        return self.run(token_by_token(ids))[0].logits


def token_by_token(ids: NDArray[np.int64]) -> Scenario:
    """One sequence, one token a call."""
    return Scenario("window", (ids,), (0,), (1,) * len(ids))
