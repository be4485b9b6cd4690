"""The TensorRT that this process builds with: a worker is started for one flavour, by the variable that Polygraphy reads too."""

from __future__ import annotations

import importlib
import os
from typing import Any

from engines.backends.worker import USE_RTX

trt: Any = importlib.import_module("tensorrt_rtx" if os.environ.get(USE_RTX, "1") != "0" else "tensorrt")
"""The module; both flavours spell what is used here alike (tests/engines/backends/test_signatures.py)."""
