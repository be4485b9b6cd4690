"""Keep the trace of a layer: the next export of the same shape is a matter of writing weights.

A trace is a graph without weights, some 20 kB. Its file is ``traces/<key>-<check>.onnx`` in the user's cache folder:
    key     hash of everything that the trace depends on: the config that was traced, dtype, cache form, opset, versions, our source files
    check   hash of the key and of the file's bytes: a damaged, truncated or renamed file is not what its name says, and is made again
A fresh trace takes the same way through bytes as a kept one, so both give the same graph.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.io_spec import Dtype, KvCache
from artifact.progress import Progress, silent
from artifact.steps import rules_hash
from artifact.user_cache import cache_folder
from exporter.trace import IR_VERSION, trace_model

logger = logging.getLogger(__name__)
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
RULES = ("exporter/*.py", "artifact/*.py")
"""Source files that decide a trace; a test compares them with what ``exporter.trace`` imports."""
KEPT_FILES = 64
"""Traces that stay, newest use first: 1.3 MB."""


def traced_layer(
    config: LlamaConfig, dtype: Dtype, kv_cache: KvCache = "dynamic", *, folder: Path | None = None, progress: Progress = silent
) -> tuple[ir.Model, bool]:
    """One layer's trace of a model's shape, kept or fresh.

    Args:
        config: the model's own, with all its layers; what a trace does not depend on (``traced_config``) is left out.
        dtype: of weights and activations.
        kv_cache: form of the cache.
        folder: where traces are kept; None is ``traces`` in the user's cache folder.
        progress: told which of the two it is.

    Returns:
        What ``trace_model`` returns for one layer, and whether it was kept. A folder that can't be read or written costs a trace, and no more.
    """
    config = traced_config(config)
    key = trace_key(key_ingredients(config, dtype, kv_cache))
    try:
        folder = folder or cache_folder() / "traces"
        kept = _read(folder, key)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        logger.warning("no trace is read from the cache: %s", error)
        kept = None
    if kept is not None:
        progress("reading the kept trace of one layer", 0, 1)
        return _parse(kept), True
    progress("tracing one layer", 0, 1)
    graph = _serialize(trace_model(config, dtype, kv_cache))
    if folder is not None:
        try:
            _write(folder, key, graph)
        except OSError as error:
            logger.warning("the trace is not kept for the next export: %s", error)
    return _parse(graph), False


def traced_config(config: LlamaConfig) -> LlamaConfig:
    """What is traced: one layer, and nothing that only generation reads. Every other field is taken to decide the trace."""
    return replace(config, num_hidden_layers=1, bos_token_id=None, eos_token_id=None)


def key_ingredients(config: LlamaConfig, dtype: Dtype, kv_cache: KvCache) -> dict[str, Any]:
    """Everything that the trace of ``config`` depends on; JSON values."""
    return {
        "config": asdict(config),
        "dtype": dtype,
        "kv_cache": kv_cache,
        "opset": io_spec.OPSETS[kv_cache],
        "ir_version": IR_VERSION,
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in PACKAGES},
        "rules": rules_hash(RULES),
    }


def trace_key(ingredients: Mapping[str, Any]) -> str:
    """128 bits of SHA-256, as hex."""
    return _hash(json.dumps(ingredients, sort_keys=True).encode())


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _read(folder: Path, key: str) -> bytes | None:
    for path in folder.glob(f"{key}-*.onnx"):
        raw = path.read_bytes()
        if path.stem == f"{key}-{_hash(key.encode(), raw)}":
            with suppress(OSError):
                os.utime(path)  # it was used: the oldest go first
            return raw
        logger.info("%s is damaged: traced again", path)
        with suppress(OSError):
            path.unlink()
    return None


def _write(folder: Path, key: str, graph: bytes) -> None:
    """Two exports may do this at once: each has a temporary name of its own, and the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix="tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(graph)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(folder / f"{key}-{_hash(key.encode(), graph)}.onnx")
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _forget_oldest(folder)


def _forget_oldest(folder: Path) -> None:
    """Keep the folder small; leftovers of a killed export count like traces, and go like them."""
    used: list[tuple[int, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another export was faster
            used.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(used, reverse=True)[KEPT_FILES:]:
        path.unlink(missing_ok=True)


def _serialize(model: ir.Model) -> bytes:
    """The graph as ONNX; a weight without bytes is written as external data, which is not there either."""
    for value in _weights(model):
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor("none", offset=0, length=0, dtype=value.dtype, shape=value.shape, name=value.name)
    raw: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return raw


def _parse(graph: bytes) -> ir.Model:
    """The graph as ``trace_model`` gave it: weights have a name, shape and dtype but no value."""
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(graph))
    for value in _weights(model):
        value.const_value = None
    return model


def _weights(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.initializers.values() if value.const_value is None or isinstance(value.const_value, ir.ExternalTensor)]
