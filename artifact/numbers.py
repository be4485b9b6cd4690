"""Numbers of a stranger's configuration: a value of another type or range is refused by the name of its key."""

from __future__ import annotations

import sys
from typing import Any

from artifact.errors import CheckpointError


def integer(where: str, value: Any) -> int:
    """An int and no bool; ``where`` is file and key, `config.json: hidden_size`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{where} must be an integer, got {value!r}")
    return value


def positive_integer(where: str, value: Any) -> int:
    """An int above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{where} must be a positive integer, got {value!r}")
    return value


def positive_number(where: str, value: Any) -> float:
    """A finite number above 0, as float; not NaN, and no int that a float can't hold."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{where} must be a positive number, got {value!r}")
    return float(value)


def token_id(where: str, value: Any) -> int | None:
    """An int from 0 on, or None."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise CheckpointError(f"{where} must be a token id, an integer from 0 on, got {value!r}")
    return value
