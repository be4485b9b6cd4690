"""Tests that export the same tiny shape again and again trace it once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import onnx_ir as ir
import pytest


@cache
def _traced(config: object, dtype: str) -> ir.Model:
    from exporter.trace import trace_model

    return trace_model(config, dtype)  # type: ignore[arg-type]


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ir.Model]:
    """The real trace, kept from test to test: a copy is stamped each time."""

    def trace(config: object, dtype: str) -> ir.Model:
        return _traced(config, dtype).clone()

    monkeypatch.setattr("exporter.export.trace_model", trace)
    return trace
