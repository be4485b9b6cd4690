from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from artifact.errors import ValidationError
from validation.sensitivity_file import read_sensitivities

LINEAR = {
    "name": "model.layers.0.mlp.down_proj", "layer": 0, "kind": "down_proj", "mean_kl": 0.01, "kl_se": 0.001, "bytes_saved": 100,
    "weight_error": 0.006, "activation_peak": 30.5, "kept": True, "reason": "a spike",
}  # fmt: skip


def write(folder: Path, content: Any, scheme: str = "int8") -> Path:
    (folder / f"sensitivity-{scheme}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_every_scheme_is_read_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"scheme": "int8-smoothquant", "tokens": 256, "linears": [LINEAR], "more": 1}, "int8-smoothquant")
    write(tmp_path, {"scheme": "int8", "tokens": 256, "linears": []})
    assert read_sensitivities(tmp_path) == [
        {"scheme": "int8", "tokens": 256, "linears": []},
        {"scheme": "int8-smoothquant", "tokens": 256, "linears": [LINEAR]},
    ]
    assert read_sensitivities(tmp_path / "none") == []


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    bare = {key: LINEAR[key] for key in ("name", "layer", "kind", "kept")}
    (entry,) = read_sensitivities(write(tmp_path, {"scheme": "int8", "linears": [bare]}))
    assert entry["linears"] == [bare | dict.fromkeys(LINEAR.keys() - bare.keys())]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read as sensitivities: Expecting"),
        ([], "it must hold scheme, a string, and linears, a list"),
        ({"scheme": 1, "linears": []}, "it must hold scheme"),
        ({"scheme": "int8", "linears": [[]]}, r"linears\[0\]: not an object"),
        ({"scheme": "int8", "linears": [LINEAR, LINEAR | {"name": 3}]}, r"linears\[1\]: name must be a string"),
        ({"scheme": "int8", "linears": [LINEAR | {"kept": 1}]}, "kept must be true or false"),
        ({"scheme": "int8", "linears": [LINEAR | {"layer": -1}]}, "layer must be a number from 0 to 999"),
        ({"scheme": "int8", "linears": [LINEAR | {"layer": True}]}, "layer must be a number"),
        ({"scheme": "int8", "linears": [LINEAR | {"layer": 10**9}]}, "layer must be a number from 0 to 999"),
        ({"scheme": "int8", "linears": [LINEAR | {"mean_kl": "big"}]}, "mean_kl must be a number or null"),
        ({"scheme": "int8", "linears": [LINEAR | {"reason": 3}]}, "reason must be a string or null"),
    ],
)
def test_another_file_is_refused_and_the_next_command_said(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        read_sensitivities(write(tmp_path, content))
    assert caught.value.hint == f"python cli.py quantize {tmp_path} --scheme int8 --force"
