"""Which of the known GPUs a card is, by the name that its driver gives it: what bounds its speed is in the target's data sheet."""

from __future__ import annotations

import re

from engines.device import Device
from engines.targets import TARGETS, Target


def card_of(device: Device) -> Target | None:
    """The target of which every word is in the card's name, the longest first: ``NVIDIA A100-SXM4-80GB`` is a100-80gb; None where none is."""
    words = set(re.split(r"[^a-z0-9]+", device.name.lower()))
    known = [target for target in TARGETS.values() if target.compute_capability == device.compute_capability]
    named = [target for target in known if set(target.name.split("-")) <= words]
    return max(named, key=lambda target: target.name.count("-"), default=None)
