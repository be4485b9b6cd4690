"""Tell quantised Hugging Face folders by the name of their method, wherever that is written: two are read, the others refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from artifact.errors import CheckpointError
from exporter.checkpoints.json_file import CONFIG, read_object
from exporter.checkpoints.quantised_config import COMPRESSED, MODELOPT, ORIGINAL, READ, QuantisedConfig, compressed_config, modelopt_config
from exporter.checkpoints.shards import inside

MODELOPT_FILE = "hf_quant_config.json"
CONFIG_KEYS = ("quantization_config", "compression_config")
"""Of config.json; the second is what older tools wrote."""
READERS = {COMPRESSED: compressed_config, MODELOPT: modelopt_config}
"""Method → what reads its configuration."""
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", MODELOPT_FILE: MODELOPT}
"""Files that a quantising tool leaves beside the weights → its method, where the file itself does not name one."""
SUFFIXES = {
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".g_idx": "gptq",
    ".SCB": "bitsandbytes int8",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    ".absmax": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or int8 with scales",
    ".input_scale": "fp8 or int8 with scales",
    ".scales": "gptq or awq",
}
"""Endings of tensor names that only quantised weights have."""
KEYS = {"load_in_8bit": "bitsandbytes int8", "load_in_4bit": "bitsandbytes", "w_bit": "awq", "bits": "gptq"}
"""Keys of a configuration that does not name its method."""


def read_quantised_config(folder: Path) -> QuantisedConfig | None:
    """What a folder says of its quantisation; None where it says nothing.

    Raises:
        CheckpointError: a method, or a form of one, that is not read.
    """
    config = read_object(inside(folder, CONFIG), hint="a Hugging Face model folder has config.json")
    beside = read_object(path, hint="") if (path := inside(folder, MODELOPT_FILE)).is_file() else {}
    for key in CONFIG_KEYS:
        if not config.get(key):
            continue
        method = _method(config[key])
        if method not in READERS:
            raise _refusal(folder, method, f"config.json has {key}")
        return READERS[method](beside if method == MODELOPT and beside else config[key])  # the file has group_size, which config.json lacks
    for name, method in FILES.items():
        if inside(folder, name).is_file() and name != MODELOPT_FILE:
            raise _refusal(folder, _method(_parsed(folder / name), default=method), f"{name} is there")
    return modelopt_config(beside) if beside else None


def refuse_quantised_tensors(folder: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError where the tensors are those of a quantised model."""
    for name in names:
        for suffix, method in SUFFIXES.items():
            if name.endswith(suffix):
                raise _refusal(folder, method, f"tensor {name} is there")


def _method(config: Any, *, default: str = "unknown method") -> str:
    if not isinstance(config, dict):
        return default if config is None else str(config)
    inner = config.get("quantization")
    named = config.get("quant_method") or (inner.get("quant_algo") if isinstance(inner, dict) else None)
    return str(named or next((method for key, method in KEYS.items() if config.get(key)), default))


def _parsed(path: Path) -> Any:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _refusal(folder: Path, method: str, evidence: str) -> CheckpointError:
    return CheckpointError(f"{folder}: the checkpoint is quantised ({method!r}): {evidence}; {READ}", hint=ORIGINAL)
