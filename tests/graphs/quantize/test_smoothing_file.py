"""graphs/quantize/smoothing_file.py: what is read is what was found."""

from __future__ import annotations

import numpy as np

from graphs.quantize.smoothing import Smoothing

SCHEME = "int8-smoothquant"
FOUND = {
    "model.layers.0.mlp.down_proj": Smoothing(np.array([0.5, 2], np.float32), 0.25, 0.85, 1.15, 0.004, 0.001, 0.3),
    "model.layers.0.self_attn.qkv_proj": Smoothing(np.ones(3, np.float32), 1e-3, None, 1.0, 0.1, 0.2, 0.1),
}
