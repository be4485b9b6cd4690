"""Every name of TensorRT that the enterprise backend and the runner spell is in its bindings, in every release that is listed."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LISTED = json.loads((Path(__file__).parents[2] / "enterprise/signatures.json").read_text())
SOURCES = ("bridge", "engine_facts", "network", "static_network", "tensorrt_worker", "timing_cache")
SINCE_11 = {"CausalMaskKind.LOWER_RIGHT"}
"""Of static caches, which the backend refuses on older releases."""
ALIASES = {"int32": "DataType.INT32", "__version__": None}
RTX_ALONE = {"DynamicShapesKernelSpecializationStrategy.NONE", "CudaGraphStrategy.DISABLED"}
"""The runner asks whether they are there."""


def spelled(tree: ast.AST) -> Iterator[str]:
    """``trt.A.B`` → A.B, the longest of each chain."""
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:
            words = ast.unparse(node).split(".")
            start = 2 if words[:2] == ["self", "_trt"] else 1 if words[0] == "trt" else 0
            if start and words[start:]:
                yield ".".join(words[start:])


def has(name: str, version: str) -> bool:
    found = [listed for known, listed in LISTED["names"].items() if known.partition("(")[0] == name or known.startswith(f"{name}.")]
    return any(listed == "all" or version in listed for listed in found)


@pytest.mark.parametrize("file", [*(f"engines/backends/{source}.py" for source in SOURCES), "engines/plan.py", "engines/plan_loading.py"])
def test_every_name_is_in_the_bindings(file: str) -> None:
    names = set(spelled(ast.parse((ROOT / file).read_text()))) - RTX_ALONE
    assert names or file.endswith("timing_cache.py")
    for version in LISTED["versions"]:
        for name in names:
            plain = ALIASES.get(name, name)
            old = name in SINCE_11 and version.startswith("10.")
            assert plain is None or old or has(plain.replace("ILogger.Severity.", "ILogger."), version), (name, version)


def test_the_list_tells_what_is_there_from_what_is_not() -> None:
    assert has("IBuilderConfig.set_flag", "11.4.0.106")
    assert not has("IBuilderConfig.set_flags", "11.4.0.106")
    assert not has("IAttention.key_value_lengths", "10.16.1.11")
    assert not has("BuilderFlag.FP16", "11.0.0.114")
