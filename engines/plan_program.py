"""Read what a TensorRT-RTX plan will run, from its bytes: no GPU, no driver, no deserialising.

A plan holds one program a profile, as text behind ``NLYM``, a 32-bit number and a 64-bit length::

    header { version = 5  inputs={ "input_ids [profile 1].1" … } … }
    descriptors { tensor={ const_payload_size=3538944 dims={ 576 3072 } name="__mye18439_dconst" offset=5 region=…-consts … type=half } … }
    main { function={ name=_gemv_mha_v1 … layers="[ONNX Layer: node_of_attention]" … }
           fully_connected={ … } runtime_fusion={ name=__myl_CastMulCastFc … } … }

A line of ``main`` is one launch, so counting lines counts kernels (a kernel's name stands many times in the bytes). A constant's ``offset``
is its index in the plan's table of weights, which all profiles share: two indices of one weight are two copies. A dimension is a number, or
the name of one that the program computes from its inputs' (``plan_shapes``).
Written from plans of TensorRT-RTX 1.7.1 with 1, 2, 5, 8 and 30 layers.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from artifact.errors import EngineError
from engines.plan_shapes import Dimension, Instruction, read_instructions

HEADER = b"header {\n  version = 5\n"
MAGIC = b"NLYM"
PREFIX = struct.Struct("<4sIQ")  # magic, a number, length of the text
KINDS = ("function", "fully_connected", "runtime_fusion")
_KERNEL = re.compile(rf"^  ({'|'.join(KINDS)})=\{{ name=\"?([^\s\"]+)[^\n]*", re.MULTILINE)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_CONSTANT = re.compile(r'^  tensor=\{[^\n]*?const_payload_size=(\d+)[^\n]*? name="([^"]*)" offset=(\d+)[^\n]* type=(\w+)', re.MULTILINE)
_VIEW = re.compile(r'^  sub_tensor=\{ base="([^"]*)"[^\n]*? name="([^"]*)"', re.MULTILINE)
_PROFILE = re.compile(r"\[profile (\d+)\]")
_QUOTED = re.compile(r'"([^"]*)"')
_TENSOR = re.compile(
    r'^  (?:sub_)?tensor=\{(?: base="(?P<base>[^"]*)")?[^\n]*? dims=\{(?P<dims>(?: (?:"[^"]*"|\d+))*) \}'
    r'[^\n]*? name="(?P<name>[^"]*)"[^\n]* type=(?P<dtype>\w+)',
    re.MULTILINE,
)
_DIMENSION = re.compile(r'"([^"]*)"|(\d+)')
_WRITTEN = re.compile(r"(?: output_args=\{ | output=\{)((?:\"[^\"]*\" ?)*)")
_TAKEN = re.compile(r"(?: input_args=\{ | input=\{)((?:\"[^\"]*\" ?)*)")
_INTERFACE = re.compile(r"(?: \[profile \d+\])?\.1$")


@dataclass(frozen=True)
class Constant:
    """A weight of the plan: its index in the table that all profiles share, its size and TensorRT's name of its type."""

    index: int
    size_bytes: int
    dtype: str


@dataclass(frozen=True)
class Tensor:
    """Something that a kernel reads or writes; a view has its own dimensions and the name of what it looks into."""

    name: str
    dims: tuple[Dimension, ...]
    dtype: str

    @property
    def interface(self) -> str:
        """The name of the graph's input or output that it is, if it is one."""
        return interface_name(self.name)


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: TensorRT's name of the kernel; ``fully_connected`` for a GEMM from its library.
        layers: names of the ONNX nodes that it computes.
        constants: the constants that it reads.
        writes: what it gives.
        reads: what it takes beside constants.
    """

    name: str
    layers: tuple[str, ...]
    constants: tuple[Constant, ...]
    writes: tuple[Tensor, ...] = ()
    reads: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Program:
    """What one profile runs.

    Attributes:
        profile: its index.
        kernels: in the order of their launch.
        constants: all that the program names.
        tensors: by the plan's name.
        inputs, outputs: names of those that are the graph's; TensorRT keeps the graph's name of most. What is updated in place is in both, under its
            output's name.
        instructions: arithmetic on dimensions.
    """

    profile: int
    kernels: tuple[Kernel, ...]
    constants: tuple[Constant, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    instructions: tuple[Instruction, ...] = ()


def read_programs(plan: Path) -> list[Program]:
    """The programs of a plan, by profile.

    Raises:
        EngineError: the file holds none that this reader knows.
    """
    if not plan.is_file() or not plan.stat().st_size:
        raise EngineError(f"{plan} is not there, or empty")
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        programs = [parse_program(text) for text in _texts(content)]
    if not programs:
        raise EngineError(f"{plan} holds no program in the form of TensorRT-RTX 1.7", hint="audit it with the version that built it")
    return sorted(programs, key=lambda program: program.profile)


def _texts(content: mmap.mmap) -> Iterator[str]:
    at = content.find(HEADER)
    while at >= 0:
        prefix = content[at - PREFIX.size : at] if at >= PREFIX.size else b""
        if len(prefix) == PREFIX.size and prefix.startswith(MAGIC):
            length: int = PREFIX.unpack(prefix)[2]
            if at + length > len(content):
                raise EngineError(f"the plan is cut off: a program of {length:,} bytes at {at:,} ends behind the file's {len(content):,}")
            yield content[at : at + length].decode(errors="replace")
        at = content.find(HEADER, at + len(HEADER))


def parse_program(text: str) -> Program:
    """Kernels, constants and tensors of one program's text."""
    head, _, main = text.partition("\nmain {\n")
    constants = {name: Constant(int(index), int(size), dtype) for size, name, index, dtype in _CONSTANT.findall(head)}
    for base, name in _VIEW.findall(head):
        if base in constants:
            constants[name] = constants[base]
    profile = _PROFILE.search(_line(head, "inputs"))
    inputs, outputs = (tuple(_QUOTED.findall(_line(head, kind))) for kind in ("inputs", "outputs"))
    tensors = {match["name"]: _tensor(match) for match in _TENSOR.finditer(head)}
    kernels = tuple(_kernel(match, constants, tensors) for match in _KERNEL.finditer(main))
    index, own = int(profile[1]) if profile else 0, tuple(set(constants.values()))
    return Program(index, kernels, own, tensors, inputs, outputs, read_instructions(main))


def interface_name(name: str) -> str:
    """The graph's name of an input or output, from the plan's: `input_ids [profile 1].1` → `input_ids`."""
    return _INTERFACE.sub("", name)


def _line(head: str, field_name: str) -> str:
    """The line of a field of the header, or ""."""
    start = f"  {field_name}={{"
    return next((line for line in head.splitlines() if line.startswith(start)), "")


def _tensor(match: re.Match[str]) -> Tensor:
    dims: list[Dimension] = [symbol or int(number) for symbol, number in _DIMENSION.findall(match["dims"])]
    return Tensor(match["base"] or match["name"], tuple(dims), match["dtype"])


def _kernel(match: re.Match[str], constants: Mapping[str, Constant], tensors: Mapping[str, Tensor]) -> Kernel:
    kind, name, line = match[1], match[2], match[0]
    read = {constants[text]: None for text in _QUOTED.findall(line) if text in constants}
    writes, taken = _operands(_WRITTEN, line), _operands(_TAKEN, line)
    reads = tuple(tensors[text] for text in taken if text in tensors and text not in constants)
    name = kind if kind == "fully_connected" else name
    return Kernel(name, tuple(_LAYER.findall(line)), tuple(read), tuple(tensors[text] for text in writes if text in tensors), reads)


def _operands(field_of: re.Pattern[str], line: str) -> list[str]:
    found = field_of.search(line)
    return _QUOTED.findall(found[1]) if found else []
