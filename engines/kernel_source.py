"""The CUDA source in a plan: TensorRT-RTX compiles its fused kernels on the user's GPU, and carries their text.

Each piece stands behind a 32-bit zero and a 32-bit length, begins with the same line, and holds about 128 KB of headers. Kernels that are equal are
stored once, with two exceptions that the same text shows many times over: fused attention, and kernels that write tensors of different sizes
(docs/adr/007). Written from plans of TensorRT-RTX 1.7.1 with 1 to 30 layers.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIRST_LINE = b"#undef __HAS_FP8\n"
LENGTHS = struct.Struct("<II")  # zero, length of the text
LARGEST = 1 << 24
_KERNEL = re.compile(rb"__global__ void (?:__launch_bounds__\(\d+\) )?(\w+?)(?:_0x\w+)?\(")


@dataclass(frozen=True)
class KernelSource:
    """One text.

    Attributes:
        kernel: TensorRT's name of the kernel, without the hash behind it; empty where the text declares none.
        size_bytes: of the text once.
        copies: how often the plan holds it.
    """

    kernel: str
    size_bytes: int
    copies: int


def read_kernel_sources(plan: Path) -> list[KernelSource]:
    """The CUDA source in a plan, what takes most room first; what is not recognised is not counted, so a size without it is never flattered."""
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = Counter(_texts(content))
    sources = [KernelSource(_kernel(text), len(text), copies) for text, copies in found.items()]
    return sorted(sources, key=lambda source: -source.size_bytes * source.copies)


def source_bytes(sources: list[KernelSource]) -> int:
    """Bytes of all copies."""
    return sum(source.size_bytes * source.copies for source in sources)


def _texts(content: mmap.mmap) -> Iterator[bytes]:
    at = 0
    while (at := content.find(FIRST_LINE, at)) >= 0:
        zero, length = LENGTHS.unpack(content[at - LENGTHS.size : at]) if at >= LENGTHS.size else (1, 0)
        known = zero == 0 and len(FIRST_LINE) < length < LARGEST and at + length <= len(content)
        if known:
            yield content[at : at + length]
        at += length if known else len(FIRST_LINE)


def _kernel(text: bytes) -> str:
    names = _KERNEL.findall(text)
    return names[-1].decode() if names else ""
