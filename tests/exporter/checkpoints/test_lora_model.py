from __future__ import annotations

import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from artifact.errors import CheckpointError
from exporter.checkpoints import Checkpoint, CheckpointRequest, open_checkpoint, open_request
from exporter.checkpoints.lora_config import read_lora_config

Writer = Callable[..., Path]
PREFIX = "base_model.model."
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
TARGETS = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]


def factors(weights: dict[str, Tensor], ranks: dict[str, int] | None = None, modules: list[str] | None = None) -> dict[str, Tensor]:
    """A and B of a PEFT adapter, with values that float32 rounds."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for module in modules or TARGETS:
        out, width = weights[f"{module}.weight"].shape
        rank = (ranks or {}).get(module, 4)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return tensors


def by_hand(weights: dict[str, Tensor], tensors: dict[str, Tensor], module: str, scaling: float) -> Tensor:
    """W + scaling·B·A, every sum in float64."""
    a, b = (tensors[f"{PREFIX}{module}.lora_{name}.weight"].double() for name in "AB")
    return weights[f"{module}.weight"].double() + scaling * (b @ a)


def merged(source: Path, adapter: Path) -> Checkpoint:
    return open_request(CheckpointRequest(str(source), lora=adapter))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("rslora", [False, True])
def test_with_adapter_merges_as_computed_by_hand(
    write_folder: Writer, write_adapter: Writer, weights: dict[str, Tensor], kind: str, rslora: bool
) -> None:
    tensors = factors(weights)
    checkpoint = merged(write_folder(), write_adapter(tensors, {"use_rslora": rslora}, kind=kind))
    for module in TARGETS:
        ours = checkpoint.read(f"{module}.weight")
        assert ours.dtype == torch.float32
        assert torch.equal(ours, by_hand(weights, tensors, module, 8 / sqrt(4) if rslora else 8 / 4).float()), module
    for name in checkpoint.shapes:
        if name.removesuffix(".weight") not in TARGETS:
            assert torch.equal(checkpoint.read(name), weights[name]), name


def test_with_adapter_follows_rank_and_alpha_patterns(write_folder: Writer, write_adapter: Writer, weights: dict[str, Tensor]) -> None:
    tensors = factors(weights, {DOWN: 2})
    patterns = {"rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {r"0\..*q_proj": 3, "down_proj": 5}}
    checkpoint = merged(write_folder(), write_adapter(tensors, patterns))
    for module, scaling in ((Q, 3 / 4), (DOWN, 5 / 2), (TARGETS[1], 5 / 4), (TARGETS[2], 8 / 4)):
        assert torch.equal(checkpoint.read(f"{module}.weight"), by_hand(weights, tensors, module, scaling).float()), module


@pytest.mark.parametrize(("source", "kind"), [("write_folder", None), ("write_bin", None), ("write_meta", None), ("write_gguf", "F16")])
def test_with_adapter_works_over_every_format_and_in_any_pieces(
    request: pytest.FixtureRequest, write_adapter: Writer, weights: dict[str, Tensor], source: str, kind: str | None
) -> None:
    tensors = factors(weights)
    base = request.getfixturevalue(source)(**({"kind": kind} if kind else {}))
    checkpoint = merged(base, write_adapter(tensors))
    assert checkpoint.format.endswith("+lora")
    for module in (Q, DOWN):
        whole = checkpoint.read(f"{module}.weight")
        assert torch.equal(whole, by_hand(weights, tensors, module, 2.0).float())
        pieces = [checkpoint.read_rows(f"{module}.weight", start, min(start + 5, len(whole))) for start in range(0, len(whole), 5)]
        assert torch.equal(torch.cat(pieces), whole)


def test_read_rows_of_a_merged_weight_does_not_depend_on_the_rows_asked_for(tmp_path: Path, write_adapter: Writer) -> None:
    from artifact.config import LlamaConfig
    from exporter.checkpoints.lora_model import with_adapter
    from exporter.checkpoints.random_model import open_random

    shape = LlamaConfig(
        **{"hidden_size": 256, "intermediate_size": 1000, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64},
        **{"vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False},
    )
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf()))
    name = "model.layers.0.mlp.gate_proj"
    tensors = {f"{PREFIX}{name}.lora_A.weight": torch.randn(64, 256), f"{PREFIX}{name}.lora_B.weight": torch.randn(1000, 64)}
    checkpoint = with_adapter(
        open_random("random", config=tmp_path / "config.json"), write_adapter(tensors, {"r": 64, "target_modules": ["gate_proj"]})
    )
    whole = checkpoint.read(f"{name}.weight")
    for step in (1, 7, 64, 100, 333):
        assert torch.equal(torch.cat([checkpoint.read_rows(f"{name}.weight", at, min(at + step, 1000)) for at in range(0, 1000, step)]), whole)


def test_with_adapter_replaces_modules_to_save_and_adds_to_an_embedding(
    write_folder: Writer, write_adapter: Writer, weights: dict[str, Tensor]
) -> None:
    generator = torch.Generator().manual_seed(1)
    head, norm = weights["lm_head.weight"] * 2, weights["model.norm.weight"] + 1
    a, b = torch.randn(4, 96, generator=generator), torch.randn(32, 4, generator=generator)
    tensors = {
        f"{PREFIX}lm_head.weight": head,
        f"{PREFIX}model.norm.modules_to_save.default.weight": norm,
        f"{PREFIX}model.embed_tokens.lora_embedding_A": a,
        f"{PREFIX}model.embed_tokens.lora_embedding_B": b,
    }
    checkpoint = merged(write_folder(), write_adapter(tensors, {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head", "norm"]}))
    assert torch.equal(checkpoint.read("lm_head.weight"), head)
    assert torch.equal(checkpoint.read("model.norm.weight"), norm)
    expected = weights["model.embed_tokens.weight"].double() + 2 * (b.double() @ a.double()).t()
    assert torch.equal(checkpoint.read("model.embed_tokens.weight"), expected.float())
    assert torch.equal(checkpoint.read_rows("model.embed_tokens.weight", 70, 91), expected[70:91].float())


def test_with_adapter_takes_an_expression_all_linear_and_chosen_layers(
    write_folder: Writer, write_adapter: Writer, weights: dict[str, Tensor]
) -> None:
    source = write_folder()
    for index, config in enumerate(
        (
            {"target_modules": r".*\.0\..*q_proj"},
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            {"target_modules": "all-linear", "layers_to_transform": [0]},
        )
    ):
        tensors = factors(weights, modules=[Q])
        checkpoint = merged(source, write_adapter(tensors, config, name=f"a{index}"))
        assert torch.equal(checkpoint.read(f"{Q}.weight"), by_hand(weights, tensors, Q, 2.0).float())


def linears(weights: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in weights if ".layers." in name and weights[name].ndim == 2]


def test_with_adapter_wants_every_linear_of_all_linear_but_lm_head(write_folder: Writer, write_adapter: Writer, weights: dict[str, Tensor]) -> None:
    source, tensors = write_folder(), factors(weights, modules=linears(weights))
    checkpoint = merged(source, write_adapter(tensors, {"target_modules": "all-linear"}))
    assert len(tensors) == 2 * 14
    assert torch.equal(checkpoint.read(f"{DOWN}.weight"), by_hand(weights, tensors, DOWN, 2.0).float())
    truncated = {name: tensor for name, tensor in tensors.items() if DOWN not in name}
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json names {DOWN}, but no tensor of it is there$"):
        merged(source, write_adapter(truncated, {"target_modules": "all-linear"}, name="truncated"))
    saved = truncated | {f"{PREFIX}{DOWN}.weight": weights[f"{DOWN}.weight"] * 2}  # PEFT adds nothing to a module that it saves whole
    replaced = merged(source, write_adapter(saved, {"target_modules": "all-linear"}, name="saved"))
    assert torch.equal(replaced.read(f"{DOWN}.weight"), weights[f"{DOWN}.weight"] * 2)


@pytest.mark.parametrize("name", ["lora_A.default.weight", "lora_A"])
def test_with_adapter_refuses_two_names_of_one_factor(write_folder: Writer, write_adapter: Writer, weights: dict[str, Tensor], name: str) -> None:
    twice = factors(weights) | {f"{PREFIX}{Q}.{name}": torch.zeros(4, 32)}
    with pytest.raises(CheckpointError, match=rf"^tensors \S+{Q}\.lora_A\S* and \S+{Q}\.lora_A\S* are two names of one weight$"):
        merged(write_folder(), write_adapter(twice))


def test_with_adapter_refuses_two_replacements_of_one_weight(write_folder: Writer, write_adapter: Writer, weights: dict[str, Tensor]) -> None:
    twice = factors(weights) | {f"{PREFIX}lm_head{infix}.weight": weights["lm_head.weight"].clone() for infix in ("", ".modules_to_save.default")}
    with pytest.raises(CheckpointError, match=r"^tensors \S+lm_head\S+ and \S+lm_head\S+ are two names of one weight$"):
        merged(write_folder(), write_adapter(twice))


def test_with_adapter_is_another_checkpoint_and_says_so(write_folder: Writer, write_adapter: Writer, weights: dict[str, Tensor]) -> None:
    source, tensors = write_folder(), factors(weights)
    base = open_checkpoint(str(source))
    key = f"{PREFIX}{Q}.lora_B.weight"
    ours, again, theirs, stronger = (
        merged(source, write_adapter(held, config, name=name))
        for name, held, config in (
            ("ours", tensors, {}),
            ("again", tensors, {}),
            ("theirs", tensors | {key: tensors[key] + 1}, {}),
            ("more", tensors, {"lora_alpha": 9, "fan_in_fan_out": True, "surprise": 1}),
        )
    )
    assert ours.fingerprint == again.fingerprint
    assert len({base.fingerprint, ours.fingerprint, theirs.fingerprint, stronger.fingerprint}) == 4
    assert ours.state != base.state
    assert (ours.name, ours.source, ours.format) == ("tiny-llama-ours", base.source, "safetensors+lora")
    assert "adapter ours: added to 4 weights, replaces 0" in ours.notes
    assert any("fan_in_fan_out" in note for note in stronger.notes)
    assert stronger.unknown_config_keys == ["adapter_config.json: surprise"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices = \[1\] is not supported"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": "4"}, "r must be a positive integer, got '4'"),
        ({"lora_alpha": None}, "'lora_alpha' is missing"),
        ({"target_modules": None}, "target_modules must be names or an expression, got None"),
        ({"target_modules": "("}, "not what PEFT writes"),
        ({"rank_pattern": {"q_proj": "x"}}, r"rank_pattern\['q_proj'\] must be a positive integer, got 'x'"),
    ],
)
def test_read_lora_config_refuses_by_name(write_adapter: Writer, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^adapter_config\.json: {message}"):
        read_lora_config(write_adapter({"a": torch.ones(1)}, config))


A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({A: None}, {}, rf"{Q} has lora_B; expected lora_A and lora_B of a linear$"),
        ({A: torch.ones(3, 32)}, {}, rf"{Q}\.lora_A has shape \[3, 32\]; rank 4 and a weight \[32, 32\] need \[4, 32\]$"),
        ({A: torch.ones(4, 64)}, {}, rf"{Q}\.lora_A has shape \[4, 64\]; rank 4 and a weight \[32, 32\] need \[4, 32\]$"),
        ({B: torch.ones(16, 4)}, {}, rf"{Q}\.lora_B has shape \[16, 4\]; rank 4 and a weight \[32, 32\] need \[32, 4\]$"),
        ({A: torch.ones(4, 32).double()}, {}, rf"tensor {A} has dtype F64; supported: F16, BF16, F32$"),
        (
            {f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(32)},
            {},
            r"\.lora_magnitude_vector belongs to no weight of the model$",
        ),
        (
            {f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32)},
            {},
            r"layers\.7\.mlp\.up_proj\.lora_A\.weight belongs to no ",
        ),
        ({f"{PREFIX}lm_head.weight": torch.ones(97, 32)}, {}, r"lm_head\.weight has shape \[97, 32\], the model's weight \[96, 32\]$"),
        ({}, {"target_modules": ["q_proj"]}, r"mlp\.down_proj\.weight is changed, but adapter_config\.json's target_modules don't name it$"),
        ({}, {"target_modules": ["q_proj", "down_proj", "v_proj"]}, r"names model\.layers\.0\.self_attn\.v_proj, but no tensor of it is there$"),
        ({}, {"modules_to_save": ["lm_head"]}, r"names lm_head, but no tensor of it is there$"),
    ],
)
def test_with_adapter_refuses_an_adapter_that_does_not_fit(
    write_folder: Writer, write_adapter: Writer, weights: dict[str, Tensor], change: dict[str, Tensor | None], config: dict[str, Any], message: str
) -> None:
    tensors = {name: tensor for name, tensor in (factors(weights) | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=rf"^adapter_model\.safetensors: .*{message}"):
        merged(write_folder(), write_adapter(tensors, config))


def test_with_adapter_refuses_to_change_an_embedding_that_is_lm_head_too(
    write_folder: Writer, write_adapter: Writer, weights: dict[str, Tensor], config: Any
) -> None:
    tied = write_folder(config.to_hf() | {"tie_word_embeddings": True}, {name: weights[name] for name in weights if name != "lm_head.weight"})
    for index, key in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        adapter = write_adapter(factors(weights) | {PREFIX + key: weights["model.embed_tokens.weight"]}, name=f"a{index}")
        with pytest.raises(CheckpointError, match=r"embed_tokens\.weight changes an embedding that is lm_head too|the model ties lm_head"):
            merged(tied, adapter)


def test_with_adapter_says_what_is_missing_in_a_folder(write_folder: Writer, write_adapter: Writer, tmp_path: Path) -> None:
    source, adapter = write_folder(), write_adapter({"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"^--lora .*/nothing: no such folder$"):
        merged(source, tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json$"):
        merged(source, source)
    (adapter / "adapter_model.safetensors").unlink()
    (source / "adapter_config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json$"):
        merged(source, source)
    with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin$"):
        merged(source, adapter)
