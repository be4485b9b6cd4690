"""Where a stage's error begins: the first layer that leaves the band of its local ratio."""

from __future__ import annotations

from math import isfinite
from typing import Any

from validation.measurement import StageMeasurement
from validation.tolerances import NARROWED

CHECK = "worst_local_ratio"


def name_first_layer(measured: StageMeasurement, checks: list[dict[str, Any]]) -> None:
    """Record the first layer whose local ratio is beyond the limit that the stage has, and say it where the worst is said.

    Args:
        measured: its local ratios, every layer's from the reference's own hidden state, so that a damaged one shows at its own place.
        checks: of the stage; a stage whose kind has no such limit has no band, and nothing is named.
    """
    check = next((check for check in checks if check["check"] == CHECK and check["passed"] is not None), None)
    if check is None or measured.local_ratios is None:
        return
    outside = [layer for layer, ratio in enumerate(measured.local_ratios) if not (isfinite(ratio) and ratio <= check["limit"])]
    if not outside:
        return
    measured.numbers["first_layer_outside"] = outside[0]
    if outside[0] != measured.numbers["worst_local_layer"]:
        check["where"] = f"{check['where']}; the first beyond is layer {outside[0]}"


def drift_words(stage: dict[str, Any], check: dict[str, Any]) -> str:
    """What a headline adds to a check that failed: the node that it was narrowed to, or else the first layer that left its band."""
    if (found := (stage.get("bisect") or {}).get("found")) and check["check"] != NARROWED:
        return f"; narrowed to {found['node']} ({found['op']}): {found['why']}"
    layer = stage.get("first_layer_outside")
    return "" if layer is None or check["check"] == CHECK else f"; the first layer beyond its band is layer {layer}"
