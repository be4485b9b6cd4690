"""Run a plan over the scenarios, as ``GraphRunner`` runs its graph: the same calls, one position a call.

Letters: B batch, L tokens, V vocab.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.io_spec import Dtype
from engines.runner import Array, Plan, PlanSession
from validation.graph_runner import RowResult, split_rows
from validation.scenarios import Call, Scenario


class PlanRunner:
    """A plan with the contract's inputs and outputs, on the GPU.

    Args:
        plan: loaded.
        config, dtype: the model it is.
    """

    def __init__(self, plan: Plan, config: LlamaConfig, dtype: Dtype) -> None:
        self.name = plan.name
        self._plan, self._config, self._dtype = plan, config, dtype

    def run(self, scenario: Scenario) -> list[RowResult]:
        """All calls of a scenario; one result per row, with the caches.

        Raises:
            EngineError: the plan admits fewer rows or positions, or the run failed.
        """
        with PlanSession(self._plan, self._config, self._dtype, batch=len(scenario.rows), length=scenario.width) as session:
            logits = [session.call(host_feeds(call)) for call in scenario.calls()]
            caches = session.caches()
        columns = np.cumsum(scenario.chunks).astype(np.int64) - 1
        return split_rows(scenario, columns, np.concatenate(logits, axis=1), caches)

    def logits(self, ids: NDArray[np.int64]) -> Array:
        """Logits [L, V] of one sequence, one decode step a token: the only way to have all of them from a plan."""
        steps = Scenario("window", (ids,), (0,), (1,) * len(ids))
        return self.run(steps)[0].logits


def host_feeds(call: Call) -> dict[str, NDArray[np.int64]]:
    """The inputs of a call that are no caches."""
    return {io_spec.INPUT_IDS: call.input_ids, io_spec.ATTENTION_MASK: call.attention_mask, io_spec.POSITION_IDS: call.position_ids}
