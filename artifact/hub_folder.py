"""Where the Hugging Face hub's own tools keep models; known without them."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$HF_HUB_CACHE``, ``$HF_HOME/hub``, or ``huggingface/hub`` in the user's cache, as huggingface_hub finds it."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "huggingface" / "hub"
