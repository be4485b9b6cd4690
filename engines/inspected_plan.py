"""What each profile of an enterprise TensorRT plan runs, from the inspector's account of its layers: the launches that an RTX plan's bytes give.

Built with detailed layers, the inspector says of each what it computes and in which ONNX nodes, in the words of the compiler that both share::

    {"Name": "_gemm_mha_v2_myl0_5", "LayerType": "kgen", "TacticName": "_gemm_mha_v2_0x…", "Metadata": "[ONNX Layer: node_l0_attention]",
     "Inputs": [{"Name": …, "Dimensions": [4, 32, -1, 128], "Format/Datatype": "Half"}], "Outputs": […]}

A dimension that differs from call to call is -1, so sizes are not followed here; layers of a second profile say so in their name.
Source: NVIDIA/TensorRT issue 4397 (detailed layers of an A100 plan), public accounts of TensorRT 10.x plans; none of a plan of this project yet.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from engines.plan_program import Constant, Kernel, Program, Tensor, interface_name

GEMM_LAYERS = ("gemm", "MatrixMultiply", "fully_connected")
"""Kinds of layer that multiply by the library's own kernels."""
LIBRARY_GEMM = "fully_connected"
SIZES = {"half": 2, "bf16": 2, "float": 4, "int8": 1, "int4": 0.5, "int32": 4, "int64": 8, "bool": 1, "fp8": 1}
_PLACE = re.compile(r"(?:_myl\d+_\d+)?(?: \[profile \d+\])?$")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_LABEL = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_CONSTANT = re.compile(r"_dconst\b|\[CONSTANT\]")
Layer = Mapping[str, Any]


def read_layers(information: Any, profiles: int) -> list[Program]:
    """The programs of a plan, one a profile.

    Args:
        information: what the inspector gave: ``{"Layers": [...], "Bindings": [...]}``, a layer being an object, or its name alone.
        profiles: how many the plan has.
    """
    layers = information.get("Layers", []) if isinstance(information, Mapping) else []
    described = [layer if isinstance(layer, Mapping) else {"Name": str(layer)} for layer in layers]
    return [_program(index, [layer for layer in described if _profile(layer) == index]) for index in range(profiles)]


def _profile(layer: Layer) -> int:
    found = _PROFILE.search(str(layer.get("Name", "")))
    return int(found[1]) if found else 0


def _program(index: int, layers: Sequence[Layer]) -> Program:
    kernels = tuple(_kernel(layer) for layer in layers if layer.get("LayerType") != "Constant")
    tensors = {tensor.name: tensor for kernel in kernels for tensor in (*kernel.reads, *kernel.writes)}
    constants = tuple({constant for kernel in kernels for constant in kernel.constants})
    outputs = tuple(tensor.name for kernel in kernels for tensor in kernel.writes)
    return Program(index, kernels, constants, tensors, (), outputs)


def _kernel(layer: Layer) -> Kernel:
    name = LIBRARY_GEMM if layer.get("LayerType") in GEMM_LAYERS else _PLACE.sub("", str(layer.get("Name", "")))
    inputs, outputs = (list(_tensors(layer.get(side))) for side in ("Inputs", "Outputs"))
    constants = tuple(_constant(tensor) for tensor in inputs if _CONSTANT.search(tensor.name))
    reads = tuple(tensor for tensor in inputs if not _CONSTANT.search(tensor.name))
    return Kernel(name, tuple(_LABEL.findall(str(layer.get("Metadata", "")))), constants, tuple(outputs), reads)


def _tensors(described: Any) -> Iterator[Tensor]:
    for one in described or ():
        dims = tuple(
            size if isinstance(size, int) and size >= 0 else f"{one.get('Name')}.{axis}" for axis, size in enumerate(one.get("Dimensions", ()))
        )
        yield Tensor(interface_name(str(one.get("Name"))), dims, _dtype(one))


def _dtype(tensor: Layer) -> str:
    """``half`` of ``Half``, or of a longer format; TensorRT's own word where it is none of ours."""
    words = str(tensor.get("Format/Datatype") or tensor.get("Datatype") or "").lower()
    return next((dtype for dtype in SIZES if re.search(rf"\b{dtype}\b", words)), "half" if "fp16" in words else words)


def _constant(tensor: Tensor) -> Constant:
    """A weight that a kernel reads; its place in the plan is not said, so its name stands for it."""
    sizes = [dim for dim in tensor.dims if isinstance(dim, int)]
    return Constant(zlib.crc32(tensor.name.encode()), int(prod(sizes) * SIZES.get(tensor.dtype, 1)), tensor.dtype)
