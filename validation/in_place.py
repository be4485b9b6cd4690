"""A call of a graph with a static cache: past and present are bound to one buffer, which is the array's own memory, as an engine does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from artifact.errors import ValidationError
from validation.calls import StaticCall

Array = NDArray[Any]


def run_in_place(session: Any, output: str, feeds: Mapping[str, Array], caches: Sequence[tuple[str, str]]) -> Array:
    """Run a session once; the arrays that are fed as caches hold what it wrote afterwards.

    Args:
        session: of ONNX Runtime.
        output: which of its other outputs to return.
        feeds: all inputs, caches too; those must be contiguous.
        caches: (past, present): input and output of each cache.
    """
    left = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    binding = session.io_binding()
    binding.bind_output(output)
    for past, present in caches:
        buffer = onnxruntime.OrtValue.ortvalue_from_numpy(left.pop(past))
        binding.bind_ortvalue_input(past, buffer)
        binding.bind_ortvalue_output(present, buffer)
    for name, array in left.items():
        binding.bind_cpu_input(name, array)
    session.run_with_iobinding(binding)
    given: Array = binding.get_outputs()[0].numpy()
    return given


def check_room(name: str, call: StaticCall, capacity: int) -> None:
    """Raise ValidationError where a call would write beyond a cache's slots; row and slots are named."""
    row = int(call.lengths.argmax())
    if call.in_use > capacity:
        first = int(call.write_indices[row])
        raise ValidationError(f"{name}: row {row} of a batch would write slots {first} to {call.in_use - 1} of a cache with {capacity}")
