"""In which dtype a plan's linears add up, read from its bytes.

Every GEMM stands in the plan as a line of text, in a program or in the graph of a fused kernel, with the dtype of its sums and its ONNX nodes::

    fully_connected={ … accumulation_type=2 … layers="[ONNX Layer: node_l0_qkv][ONNX Layer: node_l0_qkv.half]…" }

0 is float16, 2 float32. Where a profile multiplies one row alone, the product is a kernel of TensorRT's own making and has no such line.
Run on a GPU, float16 sums are the larger part of a prefill's error (docs/gpu-results.md); the casts of graphs/fusions/accumulate.py make it 2.
Written from plans of TensorRT-RTX 1.7.1.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

KEY, HALF = b"accumulation_type=", b"0"
REASON = "linears that add up in float16: a prefill's error is two to five times that of float16 with float32 sums"
_LAYER = re.compile(rb"\[ONNX Layer: ([^\]]*)\]")


def float16_sums(plan: Path, linears: Iterable[str]) -> tuple[int | None, str | None]:
    """How many linears add up in float16 in a GEMM of some profile, and the first of them.

    Args:
        plan: the file.
        linears: labels of the linears' nodes.

    Returns:
        Their number; None, and one that was not found, where more than one linear has no GEMM (lm_head has none where it multiplies one row).
    """
    sums: dict[str, set[bytes]] = {label: set() for label in linears}
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for kind, labels in _sums(content):
            for label in labels & sums.keys():
                sums[label].add(kind)
    missing = [label for label, kinds in sums.items() if not kinds]
    if len(missing) > 1 or len(missing) == len(sums):
        return None, missing[0] if missing else None
    half = [label for label, kinds in sums.items() if HALF in kinds]
    return len(half), half[0] if half else None


def _sums(content: mmap.mmap) -> Iterator[tuple[bytes, set[str]]]:
    """The number behind each ``accumulation_type=`` and the nodes that its line names."""
    at = content.find(KEY)
    while at >= 0:
        end = content.find(b"\n", at)
        line = content[at + len(KEY) : end if end >= 0 else len(content)]
        yield line.split(b" ", 1)[0], {name.decode(errors="replace") for name in _LAYER.findall(line)}
        at = content.find(KEY, at + len(KEY))
