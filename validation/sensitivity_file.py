"""What quantising each linear alone costs, as ``quantize`` measured it: ``sensitivity-<scheme>.json`` in the artifact, read for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from artifact.errors import ValidationError

PATTERN = "sensitivity-*.json"
NUMBERS = ("mean_kl", "kl_se", "bytes_saved", "weight_error", "activation_peak")
MOST_LAYERS = 1000
"""More is no model, and would be a page without end."""


def read_sensitivities(artifact: Path) -> list[dict[str, Any]]:
    """Every scheme's, by name of the file.

    Raises:
        ValidationError: a file is not what ``quantize`` writes; the message says where.
    """
    return [_read(path, artifact) for path in sorted(artifact.glob(PATTERN), key=lambda path: path.stem)]


def _read(path: Path, artifact: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(path, artifact, str(error)) from error
    if problem := _problem(content):
        raise _refused(path, artifact, problem)
    return {key: content.get(key) for key in ("scheme", "tokens")} | {"linears": [_linear(linear) for linear in content["linears"]]}


def _linear(linear: dict[str, Any]) -> dict[str, Any]:
    known = {key: linear.get(key) for key in (*NUMBERS, "reason")}
    return {key: linear[key] for key in ("name", "layer", "kind", "kept")} | known


def _problem(content: Any) -> str | None:
    """What is not as it must be; None where all is."""
    if not isinstance(content, dict) or not isinstance(content.get("scheme"), str) or not isinstance(content.get("linears"), list):
        return "it must hold scheme, a string, and linears, a list"
    return next((f"linears[{index}]: {problem}" for index, linear in enumerate(content["linears"]) if (problem := _linear_problem(linear))), None)


def _linear_problem(linear: Any) -> str | None:
    if not isinstance(linear, dict):
        return "not an object"
    for key, kind, word in (("name", str, "a string"), ("kind", str, "a string"), ("kept", bool, "true or false")):
        if not isinstance(linear.get(key), kind):
            return f"{key} must be {word}"
    layer = linear.get("layer")
    if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < MOST_LAYERS:
        return f"layer must be a number from 0 to {MOST_LAYERS - 1}"
    if not isinstance(linear.get("reason"), str | None):
        return "reason must be a string or null"
    wrong = [key for key in NUMBERS if not isinstance(linear.get(key), int | float | None) or isinstance(linear.get(key), bool)]
    return f"{wrong[0]} must be a number or null" if wrong else None


def _refused(path: Path, artifact: Path, problem: str) -> ValidationError:
    scheme = path.stem.removeprefix("sensitivity-")
    return ValidationError(f"{path} can't be read as sensitivities: {problem}", hint=f"python cli.py quantize {artifact} --scheme {scheme} --force")
