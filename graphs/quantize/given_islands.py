"""INT8 with INT8 activations of a checkpoint that was quantised for it: its levels, its scales of weights, and one static scale an input.

Before:  x ─ Cast(FLOAT) ─ MatMul(Cast(Transpose(weight))) ─ Cast(FLOAT16)
After:   an island of Q/DQ around each linear (islands.py); weight scales stay float32, exactly as they came.

static    The input's scale is the checkpoint's.
dynamic   The checkpoint wants a scale a token, which is measured while a model runs and which TensorRT has no form for. The largest |value| that
          calibration saw becomes 127 instead. Where that costs a usual row too much, for one channel or one token is far larger than the others,
          the input stays as it is and the linear is weight-only INT8: with the same levels, and nearer to the float model than the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.errors import QuantizationError
from artifact.steps import StepContext
from graphs.quantize.given import GivenScales, given_scales, stored_scales
from graphs.quantize.int8 import FORM, LEVELS
from graphs.quantize.islands import island_piece, put_islands
from graphs.quantize.linears import Linear, site_of
from graphs.quantize.statistics import Statistics
from graphs.quantize.weight_only import kept_always, open_fused
from graphs.quantize.writer import Piece, elements, write_pieces

SCHEME = "int8-smoothquant"
MOST_LOST = 0.1
"""Of a usual row's length: a scale of its own for every token costs 0.01 to 0.03."""


@dataclass(frozen=True)
class InputScale:
    """The static scale of one site, and what it costs: the median row's relative error, None where nothing was measured."""

    scale: float
    lost: float | None = None

    @property
    def kept(self) -> str | None:
        """Why the input stays as it is; None where it is rounded."""
        if self.lost is None or self.lost <= MOST_LOST:
            return None
        return f"one static scale would cost the median input {self.lost:.0%} of its length; the checkpoint has a scale a token"


def quantize_given_islands(step: StepContext, statistics: Statistics | None = None) -> dict[str, Any]:
    """Write ``int8-smoothquant.onnx`` and its weights from ``fused.onnx``, with what the checkpoint brought.

    Args:
        step: the artifact.
        statistics: what calibration measured of activations, where the checkpoint has no static scales.

    Returns:
        scheme, linears, quantized, kept, bytes, nodes, w8a8 {linears, share of the quantised weights}, sites [{site, activation_scale,
        median_row_error, kept}], given.

    Raises:
        QuantizationError: the checkpoint brought nothing, or no scale for an input and nothing was measured; the graph is quantised already; a weight
            that is not level × scale.
    """
    given = given_scales(step.artifact)
    if given is None:
        raise QuantizationError("the checkpoint was not quantised: no levels came with it", hint=f"python cli.py inspect {step.artifact}")
    model, linears, chosen = open_fused(step, SCHEME, FORM.opset)
    inputs = {site: _input_scale(given, statistics, site) for site in dict.fromkeys(site_of(linear.name) for linear in chosen)}
    stored = write_pieces(step, SCHEME, [_piece(step, linear, given, whole=inputs[site_of(linear.name)].kept is None) for linear in chosen])
    rounded = [linear for linear in chosen if inputs[site_of(linear.name)].kept is None]
    put_islands(model.graph, chosen, {linear.name: inputs[site_of(linear.name)].scale for linear in rounded}, stored)
    with step.write(f"{SCHEME}.onnx") as temporary:
        ir.save(model, temporary)
    return {
        "scheme": SCHEME,
        "linears": len(linears),
        "quantized": len(chosen),
        "kept": [*kept_always(linears, chosen), *_kept(chosen, inputs)],
        "bytes": sum(tensor.length for tensor in stored.values()),
        "nodes": model.graph.num_nodes(),
        "w8a8": {"linears": len(rounded), "share": elements(rounded) / elements(chosen)},
        "sites": [
            {"site": site, "activation_scale": one.scale, "median_row_error": one.lost, "kept": one.kept is not None} for site, one in inputs.items()
        ],
        "given": given.given.words,
    }


def _input_scale(given: GivenScales, statistics: Statistics | None, site: str) -> InputScale:
    """The checkpoint's scale, or one from what was measured."""
    own = given.input_scale(site)
    if own is not None:
        return InputScale(own)
    if statistics is None:
        raise QuantizationError(f"{site}: the checkpoint has no scale of its input, and nothing was measured", hint="leave out --calibration none")
    measured = statistics.of(site)
    scale = max(float(measured.absmax.max()) / LEVELS, float(np.finfo(np.float32).tiny))
    return InputScale(scale, median_row_error(measured.samples, scale))


def median_row_error(rows: NDArray[np.float32], scale: float) -> float:
    """|x - rounded x| ÷ |x| of the median row [n, in]; 0 where there are none."""
    lengths = np.linalg.norm(rows, axis=1)
    errors = np.linalg.norm(rows - np.clip(np.rint(rows / np.float32(scale)), -LEVELS - 1, LEVELS) * np.float32(scale), axis=1)
    return float(np.median(errors[lengths > 0] / lengths[lengths > 0])) if (lengths > 0).any() else 0.0


def _piece(step: StepContext, linear: Linear, given: GivenScales, *, whole: bool) -> Piece:
    """The checkpoint's own levels and scales of one linear."""

    def rounded(weight: NDArray[Any], dtype: np.dtype[Any]) -> tuple[NDArray[np.int8], NDArray[Any]]:
        levels, scales = given.levels(weight, linear.name)
        return levels, stored_scales(scales, dtype, given.given.bits, linear.name)

    return island_piece(linear, step.artifact, rounded, whole=whole)


def _kept(chosen: list[Linear], inputs: Mapping[str, InputScale]) -> Iterator[dict[str, str]]:
    for linear in chosen:
        if (reason := inputs[site_of(linear.name)].kept) is not None:
            yield {"name": linear.name, "reason": reason}
