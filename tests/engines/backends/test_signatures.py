"""Every name of TensorRT that the enterprise backend and the runner spell is in its bindings, in every release that is listed."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LISTED = json.loads((Path(__file__).parents[2] / "enterprise/signatures.json").read_text())
BACKEND = ("bridge", "engine_facts", "network", "static_network", "tensorrt_worker", "timing_cache")
FILES = (*(f"engines/backends/{source}.py" for source in BACKEND), "engines/plan.py", "engines/plan_loading.py", "engines/runner.py")
SINCE_11 = {"CausalMaskKind.LOWER_RIGHT", "IAttention.causal_kind", "IAttention.key_value_lengths"}
"""Of static caches, which the backend refuses on older releases."""
ALIASES = {"int32": "DataType.INT32", "__version__": None}
RTX_ALONE = {
    *("DynamicShapesKernelSpecializationStrategy.NONE", "CudaGraphStrategy.DISABLED"),
    *("IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy", "IRuntimeConfig.cuda_graph_strategy"),
}
"""The runner asks whether they are there."""
OBJECTS = {
    **{"engine": "ICudaEngine", "self._engine": "ICudaEngine", "runtime": "Runtime", "context": "IExecutionContext", "refitter": "Refitter"},
    **{"builder": "Builder", "network": "INetworkDefinition", "config": "IBuilderConfig", "parser": "OnnxParser", "first": "ParserError"},
    **{"layer": "IAttentionInputLayer", "attention": "IAttention", "one": "IAttention", "cast": "ICastLayer", "tensor": "ITensor"},
    **{"layer.get_input(0)": "ITensor", "layer.get_output(0)": "ITensor", "measured": "ITimingCache"},
    **{"engine.create_engine_inspector()": "EngineInspector"},
}
"""How the sources call what TensorRT gives them → its class."""
OTHERWISE = {
    "engines/plan.py": {"config": "IRuntimeConfig", "first": ""},
    "engines/plan_loading.py": {"parser": "OnnxParserRefitter"},
    "engines/runner.py": {"config": "", "first": ""},
}
"""The same, where a file calls another class so, or nothing of TensorRT's."""


def spelled(tree: ast.AST) -> Iterator[str]:
    """``trt.A.B`` → A.B, the longest of each chain."""
    inner = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:
            words = ast.unparse(node).split(".")
            start = 2 if words[:2] == ["self", "_trt"] else 1 if words[0] == "trt" else 0
            if start and words[start:]:
                yield ".".join(words[start:])


def asked_of_objects(tree: ast.AST, objects: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Class and member of what is asked of TensorRT's objects, with the names of the arguments that are given by name."""
    by_name = {node.func: tuple(str(word.arg) for word in node.keywords) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not node.attr.startswith("_") and (kind := objects.get(ast.unparse(node.value))):
            yield f"{kind}.{node.attr}", by_name.get(node, ())


def has(name: str, version: str, *arguments: str) -> bool:
    """Whether a release has a name, and of a function arguments of these names."""
    found = {known: listed for known, listed in LISTED["names"].items() if known.partition("(")[0] == name or known.startswith(f"{name}.")}
    fit = [listed for known, listed in found.items() if set(arguments) <= set(re.findall(r"\w+", known.partition("(")[2]))]
    return any(listed == "all" or version in listed for listed in fit)


def read(file: str) -> set[tuple[str, tuple[str, ...]]]:
    """All that a source file spells of TensorRT."""
    tree = ast.parse((ROOT / file).read_text())
    return {(name, ()) for name in spelled(tree)} | set(asked_of_objects(tree, OBJECTS | OTHERWISE.get(file, {})))


@pytest.mark.parametrize("file", FILES)
def test_every_name_is_in_the_bindings(file: str) -> None:
    names = {(name, arguments) for name, arguments in read(file) if name not in RTX_ALONE}
    assert names
    for version in LISTED["versions"]:
        for name, arguments in names:
            plain = ALIASES.get(name, name)
            old = name in SINCE_11 and version.startswith("10.")
            assert plain is None or old or has(plain.replace("ILogger.Severity.", "ILogger."), version, *arguments), (name, arguments, version)


def test_what_is_asked_of_objects_is_seen() -> None:
    names = {name for file in FILES for name, _ in read(file)}
    assert names >= {
        *("ICudaEngine.weight_streaming_budget_v2", "ICudaEngine.get_weight_streaming_automatic_budget", "ICudaEngine.create_runtime_config"),
        *("OnnxParserRefitter.refit_from_file", "Refitter.refit_cuda_engine", "Runtime.deserialize_cuda_engine", "IBuilderConfig.set_flag"),
        *("IExecutionContext.execute_async_v3", "IExecutionContext.set_tensor_address", "ICudaEngine.get_aliased_input_tensor"),
        *("Builder.build_serialized_network_to_stream", "ITimingCache.combine", "EngineInspector.get_engine_information", "OnnxParser.num_errors"),
    }


def test_the_list_tells_what_is_there_from_what_is_not() -> None:
    assert has("IBuilderConfig.set_flag", "11.4.0.106")
    assert not has("IBuilderConfig.set_flags", "11.4.0.106")
    assert not has("IAttention.key_value_lengths", "10.16.1.11")
    assert not has("BuilderFlag.FP16", "11.0.0.114")
    assert not has("ICudaEngine.weight_streaming_budget", "11.4.0.106")
    assert has("ITimingCache.combine", "11.4.0.106", "ignore_mismatch")
    assert not has("ITimingCache.combine", "11.4.0.106", "ignore_mismatches")
