"""engines/weight_sizes.py: what is predicted is what the engine graphs hold, to the byte but for scalars."""

from __future__ import annotations

import pytest

from artifact.config import LlamaConfig
from artifact.errors import EngineError
from artifact.presets import preset
from engines.weight_sizes import check_blocks, linear_parameters, weight_sizes

GIGABYTES = {("7b", "fp16"): 13.478, ("7b", "int8"): 7.005, ("13b", "int8"): 13.349, ("70b", "fp16"): 137.954, ("13b", "int4"): 7.199}
SMOL = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(("size", "precision"), GIGABYTES)
def test_totals_of_published_sizes(size: str, precision: str) -> None:
    assert weight_sizes(preset(size), precision).total / 1e9 == pytest.approx(GIGABYTES[size, precision], abs=0.001)


@pytest.mark.parametrize(("precision", "measured"), [("fp16", 270_078_818), ("int8", 164_221_538)])
def test_total_is_that_of_a_built_graph(precision: str, measured: int) -> None:
    assert 0 <= measured - weight_sizes(SMOL, precision).total < 1000  # a handful of shapes and factors


def test_linears_of_published_sizes() -> None:
    assert [linear_parameters(preset(size)) for size in ("7b", "13b", "70b")] == [6_476_005_376, 12_687_769_600, 68_451_041_280]


@pytest.mark.parametrize("config", [preset("7b"), SMOL])
def test_parts_hold_the_whole(config: LlamaConfig) -> None:
    sizes, last = weight_sizes(config, "fp16"), config.num_hidden_layers - 1
    assert sizes.of_part(0, last, tied=config.tie_word_embeddings) == sizes.total
    parts = sizes.of_part(0, 3, tied=config.tie_word_embeddings) + sizes.of_part(4, last, tied=config.tie_word_embeddings)
    assert parts - sizes.total == sizes.rotary + config.tie_word_embeddings * sizes.embedding  # a tied table is in both ends


def test_rows_that_no_block_divides_are_refused() -> None:
    with pytest.raises(EngineError, match="can't be cut into blocks of 128, 64, 32") as error:
        check_blocks(LlamaConfig(**{**SMOL.__dict__, "intermediate_size": 1500}), "int4")
    assert error.value.hint
    check_blocks(SMOL, "int4")
