"""Read what a TensorRT-RTX plan will run, from its bytes: no GPU, no driver, no deserialising.

A plan holds one program a profile, as text behind ``NLYM``, a 32-bit number and a 64-bit length::

    header { version = 5  inputs={ "input_ids [profile 1].1" … } … }
    descriptors { tensor={ const_payload_size=3538944 dims={ 576 3072 } name="__mye18439_dconst" offset=5 region=…-consts … type=half } … }
    main { function={ name=_gemv_mha_v1 … layers="[ONNX Layer: node_of_attention]" … }
           fully_connected={ … } runtime_fusion={ name=__myl_CastMulCastFc … } … }

A line of ``main`` is one launch, so counting lines counts kernels (a kernel's name stands many times in the bytes). A constant's ``offset``
is its index in the plan's table of weights, which all profiles share: two indices of one weight are two copies.
Written from plans of TensorRT-RTX 1.7.1 with 1, 2, 5, 8 and 30 layers.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from artifact.errors import EngineError

HEADER = b"header {\n  version = 5\n"
MAGIC = b"NLYM"
PREFIX = struct.Struct("<4sIQ")  # magic, a number, length of the text
KINDS = ("function", "fully_connected", "runtime_fusion")
_KERNEL = re.compile(rf"^  ({'|'.join(KINDS)})=\{{ name=\"?([^\s\"]+)[^\n]*", re.MULTILINE)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_CONSTANT = re.compile(r'^  tensor=\{[^\n]*?const_payload_size=(\d+)[^\n]*? name="([^"]*)" offset=(\d+)[^\n]* type=(\w+)', re.MULTILINE)
_VIEW = re.compile(r'^  sub_tensor=\{ base="([^"]*)"[^\n]*? name="([^"]*)"', re.MULTILINE)
_PROFILE = re.compile(r"\[profile (\d+)\]")
_BINDING = re.compile(r"(?: \[profile \d+\])?\.\d+$")
"""What a program adds to the name of a network's input or output."""
_QUOTED = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Constant:
    """A weight of the plan: its index in the table that all profiles share, its size and TensorRT's name of its type."""

    index: int
    size_bytes: int
    dtype: str


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: TensorRT's name of the kernel; ``fully_connected`` for a GEMM from its library.
        layers: names of the ONNX nodes that it computes.
        constants: the constants that it reads.
    """

    name: str
    layers: tuple[str, ...]
    constants: tuple[Constant, ...]


@dataclass(frozen=True)
class Program:
    """What one profile runs.

    Attributes:
        inputs, outputs: names of what it reads and writes at the caller's addresses; what is updated in place is in both, under its output's name.
    """

    profile: int
    kernels: tuple[Kernel, ...]
    constants: tuple[Constant, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


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
    """Kernels and constants of one program's text."""
    head, _, main = text.partition("\nmain {\n")
    constants = {name: Constant(int(index), int(size), dtype) for size, name, index, dtype in _CONSTANT.findall(head)}
    for base, name in _VIEW.findall(head):
        if base in constants:
            constants[name] = constants[base]
    inputs, outputs = (next((line for line in head.splitlines() if line.startswith(f"  {kind}={{")), "") for kind in ("inputs", "outputs"))
    profile = _PROFILE.search(inputs)
    kernels = tuple(_kernel(match, constants) for match in _KERNEL.finditer(main))
    return Program(int(profile[1]) if profile else 0, kernels, tuple(set(constants.values())), _bindings(inputs), _bindings(outputs))


def _bindings(line: str) -> tuple[str, ...]:
    return tuple(_BINDING.sub("", name) for name in _QUOTED.findall(line))


def _kernel(match: re.Match[str], constants: Mapping[str, Constant]) -> Kernel:
    kind, name, line = match[1], match[2], match[0]
    read = {constants[text]: None for text in _QUOTED.findall(line) if text in constants}
    return Kernel(kind if kind == "fully_connected" else name, tuple(_LAYER.findall(line)), tuple(read))
