"""engines/cards.py: names as drivers give them."""

from __future__ import annotations

import pytest

from engines.cards import card_of
from engines.device import Device


@pytest.mark.parametrize(
    ("name", "capability", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", (8, 0), "a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", (8, 0), "a100-40gb"),
        ("NVIDIA A30", (8, 0), "a30"),
        ("NVIDIA L40S", (8, 9), "l40s"),
        ("NVIDIA L4", (8, 9), "l4"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "rtx-4090"),
        ("NVIDIA GeForce RTX 3090", (8, 6), "rtx-3090"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "rtx-5090"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "a100-40gb"),
        ("NVIDIA A10", (8, 6), "a10"),
        ("NVIDIA A10-24GB", (8, 6), "a10"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), None),
        ("NVIDIA GeForce RTX 4090 D", (8, 9), None),
        ("NVIDIA GeForce RTX 3090 Ti", (8, 6), None),
        ("NVIDIA GeForce RTX 5090 D", (12, 0), None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", (8, 0), None),
        ("NVIDIA A30 MIG 2g.12gb", (8, 0), None),
        ("NVIDIA A10G", (8, 6), None),
        ("NVIDIA H100 80GB HBM3", (9, 0), None),
        ("NVIDIA A100-SXM4-80GB", (8, 6), None),
    ],
)
def test_a_card_is_known_by_its_name_and_capability(name: str, capability: tuple[int, int], card: str | None) -> None:
    found = card_of(Device(name, capability, 0))
    assert (found.name if found else None) == card
