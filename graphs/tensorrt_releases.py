"""Which TensorRT release first takes an ONNX operator: one table, and what a graph needs by it.

Source:  the ONNX parser's own table and changelog, release by release (github.com/onnx/onnx-tensorrt: docs/operators.md, docs/Changelog.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from artifact.errors import UsageError

RELEASES = (*(f"10.{minor}" for minor in range(17)), *(f"11.{minor}" for minor in range(6)))
"""Known releases, oldest first."""
OLDEST, NEWEST = RELEASES[0], RELEASES[-1]

LATER = {
    "DeformConv": "10.1",
    "BlackmanWindow": "10.4",
    "HammingWindow": "10.4",
    "HannWindow": "10.4",
    "STFT": "10.5",
    "Attention": "10.14",
    "RMSNormalization": "10.15",
    "RotaryEmbedding": "10.15",
    "TensorScatter": "10.15",
    "Swish": "11.0",
    "DFT": "11.2",
}
"""Operator → the release that first takes it, where that is not the oldest known one."""

EARLIER = frozenset(
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat Constant "
    "ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand "
    "EyeLike Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual "
    "GridSample GroupNormalization GRU HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM "
    "LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean "
    "MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RNN RandomNormal "
    "RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax "
    "ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round Scan Scatter "
    "ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt "
    "Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor".split()
)
"""Operators that the oldest known release takes: the table of 8.5, and what the changelog adds up to 9.3."""


@dataclass(frozen=True)
class Need:
    """What a graph needs of TensorRT.

    Attributes:
        release: the first that takes every operator; None where no known one does.
        because: the operators that need it; where there is no release, those that none is known to take.
    """

    release: str | None
    because: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For reports: both attributes, and the same in words."""
        return {"release": self.release, "because": list(self.because), "words": self.words}

    @property
    def words(self) -> str:
        """`needs TensorRT ≥ 10.15 because of RMSNormalization`."""
        named = ", ".join(self.because)
        if self.release is None:
            return f"no known TensorRT release takes {named}"
        return f"needs TensorRT ≥ {self.release}" + (f" because of {named}" if named else "")


def first_release(op_type: str, domain: str = "") -> str | None:
    """The release that first takes an operator; None where no known one does."""
    if domain not in ("", "ai.onnx"):
        return None
    return LATER.get(op_type, OLDEST if op_type in EARLIER else None)


def needed_release(nodes: Iterable[ir.Node]) -> Need:
    """The first release that takes all of some nodes."""
    operators = {(f"{node.domain}::{node.op_type}" if node.domain else node.op_type): first_release(node.op_type, node.domain) for node in nodes}
    unknown = tuple(sorted(name for name, release in operators.items() if release is None))
    if unknown:
        return Need(None, unknown)
    release = max((found for found in operators.values() if found is not None), key=RELEASES.index, default=OLDEST)
    return Need(release, tuple(sorted(name for name, found in operators.items() if found == release)) if release != OLDEST else ())


def check_release(release: str, target: str = "tensorrt") -> None:
    """Refuse a release that this table does not know, or one for another target.

    Raises:
        UsageError: with those it knows.
    """
    if release not in RELEASES:
        raise UsageError(f"--min-tensorrt {release!r} is not a release that this version knows; it knows: {', '.join(RELEASES)}")
    if target != "tensorrt":
        raise UsageError(f"--min-tensorrt is of --target tensorrt, not of {target}")


def takes(release: str, op_type: str) -> bool:
    """Whether a known release takes an operator of the standard domain."""
    first = first_release(op_type)
    return first is not None and RELEASES.index(first) <= RELEASES.index(release)
