"""A quantisation that came with the checkpoint: what it is, and where an artifact keeps its scales.

The float graphs of such an artifact hold level × scale, rounded to the artifact's dtype once. A level is then what dividing by its scale and
rounding gives again, exactly: float16 moves 128 · scale by at most 1/32 of a scale. So only the scales are stored, float32 as they were read,
and no integer twice. docs/adr/018 has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Activations = Literal["float", "static", "dynamic"]
"""What a linear's input is to be: as it is, int8 with a stored scale, or int8 with a scale a token."""

GIVEN_FILE = "given-scales.safetensors"
"""In the artifact's root: no graph points into it."""
WEIGHT_SCALE, INPUT_SCALE = "weight_scale", "input_scale"
"""Tensors of a module in that file: F32 [out, groups], and F32 [1] where activations are static."""
SMALLEST_SCALE = 2.0**-22
"""In a float16 artifact: a weight below float16's normal range is moved by up to 2⁻²⁵, which is then an eighth of a scale."""
SMALLEST_BLOCK = 32
"""Of int4 in a graph: what a group must be a multiple of."""
GIVEN_KEY = "quantization"
"""Of the model in the manifest; absent where the checkpoint was not quantised."""


@dataclass(frozen=True)
class Given:
    """A checkpoint's quantisation, as the manifest records it.

    Attributes:
        method: ``compressed-tensors`` or ``modelopt``.
        format: in the method's own word: ``pack-quantized``, ``W8A8_SQ_PER_CHANNEL`` …
        bits: of a weight.
        group_size: weights of a row that share a scale; 0 where the whole row does.
        activations: what the linears' inputs are to be.
        quantized: how many linears hold levels.
    """

    method: str
    format: str
    bits: int
    group_size: int
    activations: Activations
    quantized: int = 0

    @property
    def scheme(self) -> str | None:
        """The scheme of ``quantize`` that computes what the checkpoint is for; None where there is none."""
        if self.activations != "float":
            return "int8-smoothquant"
        if self.bits == 4:
            return "int4" if self.group_size % SMALLEST_BLOCK == 0 else None
        return "int8" if not self.group_size else None

    @property
    def words(self) -> str:
        """In one line, for people."""
        scales = f"a scale for {self.group_size} weights" if self.group_size else "a scale a row"
        inputs = {"float": "float activations", "static": "int8 activations, static scales", "dynamic": "int8 activations, a scale a token"}
        return f"{self.method} {self.format}: int{self.bits} weights, {scales}; {inputs[self.activations]}; {self.quantized} linears"

    def as_record(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def given_of(model: Mapping[str, Any] | None) -> Given | None:
    """The quantisation that the manifest's model came with; None where it came with none."""
    record = (model or {}).get(GIVEN_KEY)
    return Given(**record) if record else None
