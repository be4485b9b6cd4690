"""engines/roofline.py: the bounds of A100 cards as published bandwidths and peaks give them."""

from __future__ import annotations

import pytest

from artifact.presets import preset
from engines.roofline import compare, prefill_flops, roofline
from engines.targets import find_target

CARDS = ("a100-40gb", "a100-80gb-pcie", "a100-80gb")
DECODE = {  # one row, empty cache: 40 GB, 80 GB PCIe, 80 GB SXM; then SXM with 2,048 tokens cached
    ("7b", "fp16"): (118, 146, 154, 143),
    ("7b", "int8"): (231, 287, 302, 261),
    ("7b", "int4"): (432, 537, 566, 436),
    ("13b", "fp16"): (60.5, 75.3, 79.3, 74.5),
    ("13b", "int8"): (119, 149, 157, 139),
    ("13b", "int4"): (226, 282, 297, 239),
}
FIRST_TOKEN_MS = {"7b": (88.5, 46), "13b": (172, 89), "70b": (916, 467)}
"""Of 2,048 tokens: float16 products, int8 by int8."""


@pytest.mark.parametrize(("size", "precision"), DECODE)
def test_decode_is_bounded_by_bandwidth(size: str, precision: str) -> None:
    *empty, cached = DECODE[size, precision]
    found = [roofline(preset(size), precision, find_target(card)).decode_tokens_per_s for card in CARDS]
    assert found == pytest.approx(empty, rel=0.005)
    assert roofline(preset(size), precision, find_target("a100"), cached=2048).decode_tokens_per_s == pytest.approx(cached, rel=0.005)


@pytest.mark.parametrize("size", FIRST_TOKEN_MS)
def test_prefill_is_bounded_by_the_peak_of_its_products(size: str) -> None:
    half, integer = FIRST_TOKEN_MS[size]
    times = {
        precision: roofline(preset(size), precision, find_target("a100")).time_to_first_token_ms for precision in ("fp16", "int8", "int8-smoothquant")
    }
    assert times["fp16"] == pytest.approx(half, rel=0.005)
    assert times["int8"] == times["fp16"]  # weight-only: the products are float16's
    assert times["int8-smoothquant"] == pytest.approx(integer, rel=0.007)


def test_a_short_prompt_is_bounded_by_reading_the_weights() -> None:
    one = roofline(preset("7b"), "fp16", find_target("a100"), prompt=1)
    assert one.time_to_first_token_ms == pytest.approx(one.decode_step_ms)


def test_rows_share_the_weights_but_not_the_caches() -> None:
    one, four = (roofline(preset("7b"), "fp16", find_target("a100"), batch=batch, cached=2048) for batch in (1, 4))
    assert four.step_bytes - one.step_bytes == 3 * 2048 * 524_288
    assert 3 < four.decode_tokens_per_s / one.decode_tokens_per_s < 4


@pytest.mark.parametrize(
    ("precision", "decode", "prefill"),
    [("fp16", 1.0, 1.0), ("int8", 1.96, 1.0), ("int8-smoothquant", 1.96, 1.92), ("int4", 3.67, 1.0)],
)
def test_says_what_a_precision_gains_and_where(precision: str, decode: float, prefill: float) -> None:
    found = compare(preset("7b"), precision, find_target("a100"), batch=1, prompt=2048, cached=0)
    assert (found["decode"], found["prefill"]) == (pytest.approx(decode, abs=0.01), pytest.approx(prefill, abs=0.01))
    assert found["why"]


def test_fp32_has_no_bound_of_prefill() -> None:
    assert roofline(preset("7b"), "fp32", find_target("a100")).time_to_first_token_ms is None


def test_attention_is_counted_as_causal() -> None:
    linears, others = prefill_flops(preset("7b"), 2048)
    assert linears == 2 * 6_476_005_376 * 2048
    assert others == 2 * 2048**2 * 4096 * 32 + 2 * 32000 * 4096
