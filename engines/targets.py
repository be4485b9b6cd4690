"""The GPUs that engines can be built for, by name."""

from __future__ import annotations

from dataclasses import dataclass

from artifact.errors import EngineError


@dataclass(frozen=True)
class Target:
    """One GPU, as its data sheet gives it.

    Attributes:
        compute_capability: (major, minor); a plan runs on this one only.
        memory_gb: 10^9 bytes of device memory.
        bandwidth_gb_s: 10^9 bytes a second between memory and chip: what bounds decoding.
        peak_fp16_tflops: dense tensor-core peak with float32 accumulation: what bounds prefill.
        peak_int8_tops: dense tensor-core peak of int8 by int8: what bounds prefill where inputs are rounded too.
        note: what its name leaves open.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_gb: int
    bandwidth_gb_s: int
    peak_fp16_tflops: float
    peak_int8_tops: float
    note: str = ""

    @property
    def memory_bytes(self) -> int:
        """Device memory in bytes."""
        return self.memory_gb * 10**9


TARGETS = {
    target.name: target
    for target in (
        Target("a100-40gb", (8, 0), 40, 1555, 312, 624),
        Target("a100-80gb", (8, 0), 80, 2039, 312, 624, note="the SXM card; the PCIe card reads 1935 GB/s, 5 % less: --target a100-80gb-pcie"),
        Target("a100-80gb-pcie", (8, 0), 80, 1935, 312, 624, note="its plans and a100-80gb's run on either card"),
        Target("a30", (8, 0), 24, 933, 165, 330),
        Target("a10", (8, 6), 24, 600, 125, 250),
        Target("rtx-3090", (8, 6), 24, 936, 71, 284),
        Target("l4", (8, 9), 24, 300, 121, 242),
        Target("l40s", (8, 9), 48, 864, 362, 733),
        Target("rtx-4090", (8, 9), 24, 1008, 165.2, 660.6),
        Target("rtx-5090", (12, 0), 32, 1792, 209.5, 838),
    )
}
ALIASES = {"a100": "a100-80gb"}


def find_target(name: str) -> Target:
    """The target of that name or alias.

    Raises:
        EngineError: there is none; the message lists those there are.
    """
    target = TARGETS.get(ALIASES.get(name, name))
    if target is None:
        raise EngineError(f"no target {name!r}; there is: {', '.join((*ALIASES, *TARGETS))}", hint="--target a100-80gb")
    return target
