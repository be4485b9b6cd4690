"""Calibration as every room knows it, by scheme: the file that `quantize` measures into, the step that writes it, and how many tokens it asks for.

Schemes that round weights alone share one file. A static scale of activations is the range of what was seen, and needs three times the tokens
(docs/adr/016), so such a scheme has a file of its own: asking for it leaves the graphs of the others as they are.
"""

from __future__ import annotations

CALIBRATION = "calibration.safetensors"
"""What `calibrate` writes, in the artifact's root; graphs/quantize/statistics.py says what it holds."""
STATIC = ("int8-smoothquant",)
"""Schemes whose activations have static scales: they can't do without calibration."""
TOKENS, STATIC_TOKENS = 8192, 24_576
SAMPLES = 2048
"""Rows of the inputs of each linear that the file keeps, in float16: nearly all of its bytes."""


def calibration_file(scheme: str) -> str:
    """The file that a scheme's statistics are in."""
    return f"calibration-{scheme}.safetensors" if scheme in STATIC else CALIBRATION


CALIBRATIONS = (CALIBRATION, *map(calibration_file, STATIC))


def calibration_step(scheme: str) -> str:
    """Id of the step that writes it."""
    return f"calibrate-{scheme}" if scheme in STATIC else "calibrate"


def calibration_tokens(scheme: str, asked: int | None = None) -> int:
    """Tokens to calibrate on: as asked for, or the scheme's own number."""
    return asked or (STATIC_TOKENS if scheme in STATIC else TOKENS)
