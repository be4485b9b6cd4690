"""Enterprise TensorRT, played for a worker: what its bindings list, with the parameters that they list, and nothing else.

``FAKE_TENSORRT`` says which release. A class here offers only what ``signatures.json`` has of it in that release; a call is held against
the listed parameters by name and number, and an attribute that is not listed can't be set. Networks come from the ONNX file; a plan is JSON that says
how it was built. Nothing here proves what TensorRT makes of it.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

import onnx_ir as ir

LISTED = json.loads(Path(__file__).with_name("signatures.json").read_text())
__version__ = os.environ.get("FAKE_TENSORRT", LISTED["versions"][-1])
NAMES = [name for name, found in LISTED["names"].items() if found == "all" or __version__ in found]
OWN = "Half"


def listed(kind: str) -> dict[str, list[list[str]]]:
    """Attribute → the parameters of each overload; none of what is no function."""
    found: dict[str, list[list[str]]] = {}
    for name in (name for name in NAMES if name.startswith(f"{kind}.")):
        attribute, _, rest = name.removeprefix(f"{kind}.").partition("(")
        found.setdefault(attribute, []).extend([[one for one in rest.removesuffix(")").split(", ") if one]] if "(" in name else [])
    return found


def fits(parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    names = [one.removesuffix("=") for one in parameters]
    given = {*names[: len(args)], *kwargs}
    needed = {one for one in parameters if not one.endswith("=")}
    return len(args) <= len(names) and set(kwargs) <= set(names[len(args) :]) and needed <= given


def held(kind: str, name: str, function: Any, overloads: list[list[str]]) -> Any:
    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(fits(one, args, kwargs) for one in overloads):
            raise TypeError(f"{kind}.{name}{args}{kwargs}: the bindings of {__version__} have {overloads}")
        return function(self, *args, **kwargs)

    return call


def strict(kind: Any) -> Any:
    """A class that offers what is listed, and no more."""
    name = kind.__name__
    allowed = listed(name)
    for attribute, value in list(vars(kind).items()):
        if attribute.startswith("_") and attribute != "__init__":
            continue
        if attribute == "__init__" and not allowed.get(attribute):
            continue  # made by TensorRT alone
        if attribute not in allowed:
            delattr(kind, attribute)
        elif callable(value) and not isinstance(value, property):
            setattr(kind, attribute, held(name, attribute, value, allowed[attribute]))
    inherited = allowed.keys() | listed("ILayer").keys() if name.endswith("Layer") else allowed.keys()

    def set_listed(self: Any, attribute: str, value: Any) -> None:
        if not attribute.startswith("_") and attribute not in inherited:
            raise AttributeError(f"{name} has no {attribute} in the bindings of {__version__}")
        object.__setattr__(self, attribute, value)

    if not name.startswith(("IStreamWriter", "IProgressMonitor", "ILogger")):
        kind.__setattr__ = set_listed
    return kind


def enum(name: str) -> Any:
    members = [one for one in listed(name) if one.isupper() or one[:1].isupper()]
    return IntEnum(name, {member: index for index, member in enumerate(members)})


for _name in (
    "BuilderFlag CausalMaskKind HardwareCompatibilityLevel LayerInformationFormat LayerType MemoryPoolType NetworkDefinitionCreationFlag "
    "ProfilingVerbosity TensorIOMode"
).split():
    if listed(_name):
        globals()[_name] = enum(_name)
float32, float16, int32, int64, int8, bool = "Float", "Half", "Int32", "Int64", "Int8", "Bool"
module = sys.modules[__name__]


@strict
class ILogger:
    Severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

    def __init__(self) -> None: ...


@strict
class IProgressMonitor:
    def __init__(self) -> None: ...


@strict
class IStreamWriter:
    def __init__(self) -> None: ...


@strict
class ITensor:
    is_shape_tensor, is_network_output = False, False

    def __init__(self, name: str, is_network_input: Any = False) -> None:
        self.name, self.dtype, self.shape = name, float16, (-1,)
        object.__setattr__(self, "is_network_input", is_network_input)


@strict
class IAttention:
    def __init__(self, name: str) -> None:
        self.name = name
        if "causal_kind" in listed("IAttention"):
            self.causal_kind, self.key_value_lengths = module.CausalMaskKind.UPPER_LEFT, None


@strict
class ILayer:
    def __init__(self, name: str, kind: Any, attention: Any = None) -> None:
        self.name, self.type, self._attention = name, kind, attention

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


@strict
class IAttentionInputLayer(ILayer):
    @property
    def attention(self) -> Any:
        return self._attention


@strict
class INetworkDefinition:
    def __init__(self) -> None:
        self._inputs: list[Any] = []
        self._layers: list[Any] = []
        self._graph: Any = None

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_layer(self, index: int) -> Any:
        return self._layers[index]

    def add_cast(self, input: Any, to_type: Any) -> Any:
        cast = ILayer("cast", None)
        cast._outputs = [ITensor(f"{input.name} as {to_type}")]
        self._layers.append(cast)
        return cast

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Any:
        return iter(self._layers)


@strict
class OnnxParser:
    def __init__(self, network: Any, logger: Any) -> None:
        self._network = network

    def parse_from_file(self, model: str) -> Any:
        graph = ir.load(model).graph
        self._network._graph = model
        self._network._inputs = [ITensor(value.name, True) for value in graph.inputs]
        tensors = {tensor.name: tensor for tensor in self._network._inputs}
        outputs = {value.name for value in graph.outputs}
        for node in graph:
            kinds = {"Attention": "ATTENTION_INPUT", "TensorScatter": "KV_CACHE_UPDATE"}
            kind = module.LayerType[kinds.get(node.op_type, "IDENTITY")]
            name = node.name or f"node_of_{node.outputs[0].name}"
            layer = ILayer(name, kind, IAttention(name) if node.op_type == "Attention" else None)
            layer._inputs = [tensors.get(value.name) if value is not None else None for value in node.inputs]
            layer._outputs = [ITensor(value.name) for value in node.outputs]
            for tensor in layer._outputs:
                object.__setattr__(tensor, "is_network_output", tensor.name in outputs)
                tensors[tensor.name] = tensor
            self._network._layers.append(layer)
        return True


@strict
class ITimingCache:
    def __init__(self, header: str, times: set[str]) -> None:
        self._header, self._times = header, times

    def combine(self, input_cache: Any, ignore_mismatch: Any) -> Any:
        if input_cache._header != self._header and not ignore_mismatch:
            return False
        self._times |= input_cache._times
        return True

    def serialize(self) -> bytes:
        return json.dumps([self._header, sorted(self._times)]).encode()


@strict
class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [list(min), list(opt), list(max)]


@strict
class IBuilderConfig:
    def __init__(self) -> None:
        self._flags, self._pools, self._cache = {"TF32"}, {}, None
        self._profiles: list[Any] = []

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool.name] = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        if serialized_timing_cache and not serialized_timing_cache.startswith(b"["):
            return None
        header, times = json.loads(serialized_timing_cache) if serialized_timing_cache else (__version__, [])
        return ITimingCache(header, set(times))

    def set_timing_cache(self, cache: Any, ignore_mismatch: Any) -> Any:
        if cache._header != __version__ and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


@strict
class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        assert flags & (1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        return INetworkDefinition()

    def create_builder_config(self) -> Any:
        return IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return IOptimizationProfile()

    def build_serialized_network_to_stream(self, network: Any, config: Any, writer: Any) -> Any:
        config._cache._times.add(Path(network._graph).name)
        config.progress_monitor.phase_start("Building engine", None, 1)
        config.progress_monitor.phase_finish("Building engine")
        attentions = [layer._attention for layer in network._layers if layer._attention is not None]
        plan = {
            "graph": network._graph,
            "profiles": config._profiles,
            "flags": sorted(config._flags),
            "pools": config._pools,
            "level": getattr(config, "builder_optimization_level", None),
            "verbosity": config.profiling_verbosity.name,
            "hardware": config.hardware_compatibility_level.name,
            "lengths": [str(getattr(one, "causal_kind", None)) for one in attentions],
        }
        return writer.write(json.dumps(plan).encode()) > 0


@strict
class EngineInspector:
    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan

    def get_engine_information(self, format: Any) -> str:
        layers = []
        for profile in range(len(self._plan["profiles"])):
            for node in ir.load(self._plan["graph"]).graph:
                kind, name = {"Attention": ("kgen", "_gemm_mha_v2"), "MatMul": ("gemm", f"node_of_{node.outputs[0].name}")}.get(
                    node.op_type, ("kgen", f"__myl_{node.op_type[:4].title()}")
                )
                layers.append({
                    "Name": f"{name}_myl{profile}_{len(layers)}" + (f" [profile {profile}]" if profile else ""),
                    "LayerType": kind,
                    "Metadata": f"[ONNX Layer: {node.name or f'node_of_{node.outputs[0].name}'}]",
                    "Inputs": [{"Name": "x", "Dimensions": [-1, -1, 8], "Format/Datatype": OWN}],
                    "Outputs": [{"Name": node.outputs[0].name, "Dimensions": [-1, -1, 8], "Format/Datatype": OWN}],
                })  # fmt: skip
        return json.dumps({"Layers": layers, "Bindings": []})


@strict
class ICudaEngine:
    device_memory_size_v2, streamable_weights_size = 1 << 20, 1 << 10

    def __init__(self, plan: dict[str, Any]) -> None:
        graph = ir.load(plan["graph"]).graph
        self._plan = plan
        self._inputs, self._outputs = ([str(value.name) for value in values] for values in (graph.inputs, graph.outputs))
        self._aliases = {str(node.outputs[0].name): str(node.inputs[0].name) for node in graph if node.op_type == "TensorScatter"}

    @property
    def refittable(self) -> Any:
        return "REFIT_IDENTICAL" in self._plan["flags"]

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs + self._outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return (self._inputs + self._outputs)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return module.TensorIOMode.INPUT if name in self._inputs else module.TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        return [tuple(shape) for shape in self._plan["profiles"][profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> Any:
        return self._aliases.get(name)

    def create_engine_inspector(self) -> Any:
        return EngineInspector(self._plan)


@strict
class Runtime:
    def __init__(self, logger: Any) -> None: ...

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        plan = json.loads(serialized_engine)
        assert "VERSION_COMPATIBLE" not in plan["flags"] or self.engine_host_code_allowed
        return ICudaEngine(plan)
