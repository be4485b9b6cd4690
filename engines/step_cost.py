"""What one step takes of a machine, how fast a machine is, and what every step that runs torch has in memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from artifact.config import LlamaConfig
from artifact.io_spec import DTYPE_BYTES
from engines.build_cost import MEGABYTE
from engines.weight_sizes import linear_parameters

TORCH_MEMORY = 900 * MEGABYTE
"""torch, its threads' buffers, and the tokens' hidden states."""
DRIVEN_WEIGHTS_S = 5e6
"""Weights a second that are rounded by calibration, at ``REFERENCE``."""


@dataclass(frozen=True)
class Rates:
    """What a machine was measured to do.

    Attributes:
        disk_gb_s: 10^9 bytes a second, written and synced.
        gflops: float32 matrix products with all cores.
    """

    disk_gb_s: float
    gflops: float

    def as_json(self) -> dict[str, float]:
        """Rounded."""
        return {key: round(value, 2) for key, value in asdict(self).items()}


REFERENCE = Rates(0.6, 60.0)
"""Two virtual cores of one physical core, on which the times below were taken."""


@dataclass(frozen=True)
class StepCost:
    """Of one step.

    Attributes:
        step: its command.
        memory_bytes: at its peak, anonymous: what can't be given back.
        disk_bytes: that it adds to the artifact.
        seconds: an order of magnitude.
        assumption: what that rests on.
    """

    step: str
    memory_bytes: int
    disk_bytes: int
    seconds: float
    assumption: str


def torch_memory(config: LlamaConfig) -> int:
    """torch, and a layer of the float32 reference."""
    return TORCH_MEMORY + layer_float32(config)


def layer_float32(config: LlamaConfig) -> int:
    """Bytes of a layer's linears."""
    return DTYPE_BYTES["fp32"] * linear_parameters(config) // config.num_hidden_layers
