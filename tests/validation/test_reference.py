from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from artifact.layout import tensor_shapes
from exporter.checkpoints import Checkpoint
from exporter.model import LlamaModel
from exporter.rope import rotary_tables
from validation.floor import transformers_logits
from validation.reference import Reference
from validation.spill import Spill

SEQUENCES = [np.arange(3, 43), np.array([5, 1, 60]), np.array([7])]


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return Reference(checkpoint.config, checkpoint.read)


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint) -> LlamaModel:
    """The same model with all of its weights in memory."""
    model = LlamaModel(checkpoint.config).eval()
    cos, sin = rotary_tables(checkpoint.config, torch.float32)
    weights = {name: checkpoint.read(name).float() for name in tensor_shapes(checkpoint.config)}
    model.load_state_dict(weights | {"model.rotary_emb.cos": cos, "model.rotary_emb.sin": sin})
    return model


def forward(model: LlamaModel, ids: np.ndarray) -> tuple[np.ndarray, list[tuple[torch.Tensor, torch.Tensor]]]:
    config, length = model.config, len(ids)
    empty = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)
    with torch.inference_mode():
        logits, presents = model(
            torch.from_numpy(ids)[None],
            torch.ones(1, length, dtype=torch.int64),
            torch.arange(length)[None],
            [(empty, empty)] * config.num_hidden_layers,
        )
    return logits[0].numpy(), presents


def test_run_equals_the_whole_model_in_logits_and_caches(reference: Reference, whole: LlamaModel) -> None:
    for run, ids in zip(reference.run(SEQUENCES), SEQUENCES, strict=True):
        logits, presents = forward(whole, ids)
        assert np.allclose(run.logits(), logits, atol=1e-5, rtol=0)
        for layer, (keys, values) in enumerate(presents):
            assert np.allclose(run.keys[layer], keys[0], atol=1e-6, rtol=0)
            assert np.allclose(run.values[layer], values[0], atol=1e-6, rtol=0)


def test_run_agrees_with_transformers_in_float32(reference: Reference, checkpoint: Checkpoint) -> None:
    theirs = transformers_logits(checkpoint.config, checkpoint.read, SEQUENCES, torch.float32)
    for run, logits in zip(reference.run(SEQUENCES), theirs, strict=True):
        assert np.abs(run.logits() - logits).max() < 1e-5 * np.abs(logits).max()


def test_run_keeps_what_was_asked_for_and_no_more(reference: Reference) -> None:
    runs = reference.run(SEQUENCES, keep_hidden={0}, keep_cache={1})
    n_layers, hidden_size = reference.config.num_hidden_layers, reference.config.hidden_size
    assert runs[0].hidden is not None
    assert [state.shape for state in runs[0].hidden] == [(40, hidden_size)] * (n_layers + 1)
    assert runs[1].hidden is None
    assert [len(run.keys) for run in runs] == [0, n_layers, 0]


def test_hidden_states_are_the_layers_inputs_and_the_last_output(reference: Reference) -> None:
    (run,) = reference.run(SEQUENCES[:1], keep_hidden={0})
    assert run.hidden is not None
    assert np.array_equal(run.hidden[0], reference.read("model.embed_tokens.weight").float().numpy()[SEQUENCES[0]])
    with torch.inference_mode():
        state = torch.from_numpy(run.hidden[-1])[None]
        normed = reference.final_norm(torch.float32)(state)[0]
    assert torch.equal(normed, run.final_hidden)


def test_a_sequence_does_not_depend_on_the_others(reference: Reference) -> None:
    together, alone = reference.run(SEQUENCES)[1], reference.run([SEQUENCES[1]])[0]
    assert np.array_equal(together.logits(), alone.logits())


def test_logits_of_a_window_are_a_slice(reference: Reference) -> None:
    (run,) = reference.run(SEQUENCES[:1])
    assert np.allclose(run.logits(slice(3, 5)), run.logits()[3:5], atol=1e-6)


def test_weights_of_one_layer_at_a_time_are_read(checkpoint: Checkpoint) -> None:
    read: list[str] = []
    reference = Reference(checkpoint.config, lambda name: (read.append(name), checkpoint.read(name))[1])
    reference.run(SEQUENCES)
    layers = [name.split(".")[2] for name in read if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert len(read) == len(set(read)) == len(tensor_shapes(checkpoint.config))


def test_on_layer_sees_each_layer_before_it_runs(reference: Reference) -> None:
    seen: list[int] = []
    reference.run(SEQUENCES[:1], on_layer=lambda index, layer: seen.append(index))
    assert seen == list(range(reference.config.num_hidden_layers))


def test_logits_are_the_same_with_the_output_layer_on_disk(checkpoint: Checkpoint, reference: Reference, tmp_path: Path) -> None:
    streamed, spill = Reference(checkpoint.config, checkpoint.read), Spill(tmp_path)
    kept: list[np.ndarray] = []
    streamed.keep_head(lambda array: kept.append(spill.keep(array)) or kept[0])  # type: ignore[func-returns-value]
    assert np.shares_memory(streamed.lm_head.numpy(), kept[0])
    assert streamed.is_float16(streamed.head_name)
    for ours, theirs in zip(streamed.run(SEQUENCES), reference.run(SEQUENCES), strict=True):
        assert np.array_equal(ours.logits(), theirs.logits())
