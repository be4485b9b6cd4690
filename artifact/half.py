"""Float16 to float32, exactly: a shift and one product, where NumPy converts number by number in six times the time.

float16  s eeeee mmmmmmmmmm               sign-extended, 13 to the left and the sign's copies cut off:
float32  s 000eeeee mmmmmmmmmm000…        the same number ÷ 2^112, subnormal ones included
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SHIFT, RAISED = np.int32(13), np.float32(2.0**112)
SIGN_AND_VALUE = np.array(0x8FFFE000, np.uint32).astype(np.int32)
SMALLEST = np.array(1 << int(SHIFT), np.int32).view(np.float32)
"""Float16's smallest number ÷ 2^112."""
MAGNITUDE, INFINITE = np.uint16(0x7FFF), 0x7C00


def widened(values: NDArray[Any], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Finite float16 values, or float32 ones, copied to float32; of more than fit the cache the caller gives some at a time.

    Infinities and NaN of float16 do not stay what they are: ``all_finite`` comes first.
    """
    exact = np.empty(values.shape, np.float32) if out is None else out
    if values.dtype != np.float16 or _subnormals_are_zero():
        np.copyto(exact, values)
        return exact
    bits = exact.view(np.int32)
    np.copyto(bits, values.view(np.int16))
    np.left_shift(bits, SHIFT, out=bits)
    np.bitwise_and(bits, SIGN_AND_VALUE, out=bits)
    return np.multiply(exact, RAISED, out=exact)


def _subnormals_are_zero() -> bool:
    """Whether this thread's processor takes subnormal float32 numbers for zero, as a library may have told it to."""
    return bool(np.multiply(SMALLEST, RAISED) == 0)


def all_finite(values: NDArray[Any], scratch: NDArray[np.float32] | None = None) -> bool:
    """Whether no value is NaN or Inf; ``scratch`` is memory of their shape that may be written over."""
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    bits = np.empty(values.shape, np.uint16) if scratch is None else scratch.reshape(-1).view(np.uint16)[: values.size].reshape(values.shape)
    return int(np.bitwise_and(values.view(np.uint16), MAGNITUDE, out=bits).max(initial=0)) < INFINITE
