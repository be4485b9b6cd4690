"""Where things are kept between artifacts: the demo checkpoint, and traces of layers."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/llama2trt``; a relative ``XDG_CACHE_HOME`` is ignored, as its specification says."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "llama2trt"
