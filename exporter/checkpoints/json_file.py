"""A JSON object that lies beside the weights, however a stranger left it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from artifact.errors import CheckpointError

CONFIG = "config.json"
"""A Hugging Face folder's description of its model."""


def read_object(path: Path, *, hint: str) -> dict[str, Any]:
    """The object in a file.

    Args:
        path: the file.
        hint: what to do where there is none.

    Raises:
        CheckpointError: no such file, a folder of that name, one that can't be opened, not JSON, or JSON of another kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise CheckpointError(f"{path.parent}: no {path.name}", hint=hint) from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
