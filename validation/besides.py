"""What a validation does besides measuring its stages against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from validation.baseline_file import Baseline
from validation.kept.save import save_reference
from validation.oracle import Oracle
from validation.transformers_check import check_reference
from validation.transformers_model import TransformersModel


@dataclass(frozen=True)
class Besides:
    """What else is asked for.

    Attributes:
        baseline: an older report to hold the new one against.
        transformers: Hugging Face's own Llama, that the reference itself is held against.
        save: where the reference's predictions are kept, if anywhere, and how many best tokens of each position.
    """

    baseline: Baseline | None = None
    transformers: TransformersModel | None = None
    save: tuple[Path, int] | None = None

    def measure(self, step: StepContext, oracle: Oracle, checkpoint: Checkpoint) -> dict[str, Any]:
        """The report's ``against`` and ``saved_reference``, null where they were not asked for.

        Raises:
            ValidationError: the baseline is of other texts.
        """
        if self.baseline is not None:
            self.baseline.require_comparable(oracle.describe_texts())
        return {
            "saved_reference": save_reference(self.save[0], oracle, checkpoint, self.save[1]) if self.save else None,
            "against": check_reference(step, oracle, self.transformers) if self.transformers else None,
        }


NOTHING = Besides()
