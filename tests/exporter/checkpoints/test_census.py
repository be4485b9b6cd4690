from __future__ import annotations

from dataclasses import replace

import pytest

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.layout import tensor_shapes
from exporter.checkpoints.census import check_tensors

Q = "model.layers.1.self_attn.q_proj.weight"


def never(ours: str, theirs: str) -> bool:
    raise AssertionError(f"nothing to compare: {ours}, {theirs}")


def test_check_tensors_returns_the_weights_in_stored_order(config: LlamaConfig) -> None:
    found = dict(reversed(tensor_shapes(config).items()))
    shapes, dropped = check_tensors(config, found, equal=never)
    assert list(shapes.items()) == list(tensor_shapes(config).items())
    assert dropped == []


def test_check_tensors_drops_and_lists_what_is_known_not_to_be_weights(config: LlamaConfig) -> None:
    tables = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rope.freqs", "rope_freqs.weight"]
    _, dropped = check_tensors(config, tensor_shapes(config) | dict.fromkeys(tables, (4,)), equal=never)
    assert dropped == tables


@pytest.mark.parametrize("layers", [1, 3])
def test_check_tensors_says_when_config_and_weights_differ_in_layers(config: LlamaConfig, layers: int) -> None:
    with pytest.raises(CheckpointError, match=rf"^config has {layers} layers, weights hold 2$"):
        check_tensors(replace(config, num_hidden_layers=layers), tensor_shapes(config), equal=never)


def test_check_tensors_names_a_missing_tensor(config: LlamaConfig) -> None:
    found = tensor_shapes(config)
    del found[Q]
    with pytest.raises(CheckpointError, match=rf"^missing tensor {Q}$"):
        check_tensors(config, found, equal=never)


def test_check_tensors_counts_what_it_does_not_name(config: LlamaConfig) -> None:
    found = {name: shape for name, shape in tensor_shapes(config).items() if "layers.0" not in name}
    with pytest.raises(CheckpointError, match=r"^missing 9 tensors: model\.layers\.0\..* and 4 more$"):
        check_tensors(config, found, equal=never)


def test_check_tensors_names_an_extra_tensor(config: LlamaConfig) -> None:
    with pytest.raises(CheckpointError, match=r"^extra tensor model\.layers\.0\.self_attn\.q_proj\.bias: not a weight") as caught:
        check_tensors(config, tensor_shapes(config) | {"model.layers.0.self_attn.q_proj.bias": (32,)}, equal=never)
    assert '"attention_bias": true' in str(caught.value.hint)


def test_check_tensors_takes_biases_where_the_config_has_them(config: LlamaConfig) -> None:
    biased = replace(config, attention_bias=True)
    assert check_tensors(biased, tensor_shapes(biased), equal=never) == (tensor_shapes(biased), [])
    with pytest.raises(CheckpointError, match=r"^missing 8 tensors: model\.layers\.0\.self_attn\.q_proj\.bias, "):
        check_tensors(biased, tensor_shapes(config), equal=never)


def test_check_tensors_names_tensor_and_both_shapes(config: LlamaConfig) -> None:
    with pytest.raises(CheckpointError, match=rf"^tensor {Q}: config expects shape \[32, 32\], the checkpoint has \[32, 31\]$"):
        check_tensors(config, tensor_shapes(config) | {Q: (32, 31)}, equal=never)


def test_check_tensors_drops_a_tied_lm_head_that_is_the_embedding(config: LlamaConfig) -> None:
    tied = replace(config, tie_word_embeddings=True)
    shapes, dropped = check_tensors(tied, tensor_shapes(config), equal=lambda ours, theirs: True)
    assert dropped == ["lm_head.weight"]
    assert "lm_head.weight" not in shapes


def test_check_tensors_refuses_a_tied_lm_head_of_its_own(config: LlamaConfig) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        check_tensors(replace(config, tie_word_embeddings=True), tensor_shapes(config), equal=lambda ours, theirs: False)


def test_check_tensors_hints_at_tying_when_only_lm_head_is_missing(config: LlamaConfig) -> None:
    found = tensor_shapes(replace(config, tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match=r"^missing tensor lm_head\.weight$") as caught:
        check_tensors(config, found, equal=never)
    assert "tie_word_embeddings" in (caught.value.hint or "")
