"""engines/plan_words.py: layers that read alike stand on one line."""

from __future__ import annotations

from typing import Any

from engines.plan_words import LayerLine, layer_lines


def kernel(kind: str, weight: str | None = None, *writes: str, name: str = "k") -> dict[str, Any]:
    return {"kernel": name, "kind": kind, "weight": weight, "writes": list(writes)}


def test_folds_layers_that_read_alike_whatever_their_kernels_are_called() -> None:
    first, other = [kernel("norm"), kernel("gemm", "half")], [kernel("norm"), kernel("gemm", "half", name="fully_connected")]
    layers = [
        {"first": 0, "last": 0, "kernels": [*first, kernel("copy")]},
        {"first": 1, "last": 28, "kernels": first},
        {"first": 29, "last": 29, "kernels": other},
    ]
    lines = layer_lines({"decode": {"layers": layers, "outside": [kernel("gemm", "half", "logits")]}})
    assert lines == [
        LayerLine("decode", "layer 0", 3, "norm · gemm half · copy"),
        LayerLine("decode", "layers 1–29 (29 alike)", 2, "norm · gemm half"),
        LayerLine("decode", "outside the layers", 1, "gemm half"),
    ]


def test_says_what_a_kernel_does_beside_its_work() -> None:
    cache = kernel("cache", None, "present key", "present value", "copied keys or values", "copied keys or values", "repeated keys or values")
    (line,) = layer_lines({"prefill": {"layers": [{"first": 0, "last": 0, "kernels": [cache]}], "outside": []}})
    assert line.content == "cache (repeats keys or values, copies keys or values)"


def test_a_record_without_layers_has_no_lines() -> None:
    assert layer_lines({}) == []
