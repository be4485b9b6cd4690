"""Which of the known GPUs a card is, by the name that its driver gives it: what bounds its speed is in the target's data sheet."""

from __future__ import annotations

import re

from engines.device import Device
from engines.targets import TARGETS, Target

MAKER = {"nvidia", "tesla", "geforce"}
_BOARD = re.compile(r"sxm\d*|pcie")
"""What a name may say besides: whose it is, and how the card is plugged in."""


def card_of(device: Device) -> Target | None:
    """The target of which every word is in the card's name, the longest first: ``NVIDIA A100-SXM4-80GB`` is a100-80gb.

    None where no target is, or where the name says more: a ``Ti``, a ``Laptop GPU``, a ``D`` or a slice (``MIG 1g.10gb``) is another card.
    """
    words = set(re.split(r"[^a-z0-9]+", device.name.lower())) - MAKER
    known = [target for target in TARGETS.values() if target.compute_capability == device.compute_capability]
    named = [target for target in known if set(target.name.split("-")) <= words]
    card = max(named, key=lambda target: target.name.count("-"), default=None)
    return card if card and all(map(_BOARD.fullmatch, words - _words(card))) else None


def _words(target: Target) -> set[str]:
    return {*target.name.split("-"), f"{target.memory_gb}gb"}
