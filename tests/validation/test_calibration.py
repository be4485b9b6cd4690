"""calibration.safetensors against what enters the linears of transformers' model; and activations that must not be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from artifact.calibration import CALIBRATION
from artifact.errors import ArtifactError, QuantizationError
from artifact.layout import EMBEDDING, linear_shapes, tensor_shapes
from artifact.steps import StepContext
from exporter.checkpoints import Checkpoint
from graphs.quantize.linears import site_of
from graphs.quantize.statistics import Statistics
from validation import calibration, floor
from validation.artifact_weights import artifact_reader
from validation.calibration import choose_rows, site_widths, write_statistics
from validation.calibration_text import CalibrationText
from validation.reference import Reference

SEQUENCES = (np.arange(3, 43), np.array([3, 1, 60]), np.arange(3, 20))
Inputs = dict[str, list[np.ndarray]]


def text(bos: int | None = 3) -> CalibrationText:
    return CalibrationText(SEQUENCES, bos, "t.txt", "abc", 1)


@pytest.fixture(scope="module")
def inputs(checkpoint: Checkpoint) -> Inputs:
    """Module path of every linear of the layers → its input [L, in] in every sequence, by transformers' own model."""
    model = floor._transformers_model(checkpoint.config, checkpoint.read, torch.float32)
    found: Inputs = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0][0].numpy()))
    with torch.inference_mode():
        for ids in SEQUENCES:
            model(torch.from_numpy(ids)[None], use_cache=False)
    return dict(found)


def measured(folder: Path, checkpoint: Checkpoint, sequences: CalibrationText, read: Callable[[str], Tensor] | None = None) -> Statistics:
    write_statistics(StepContext(folder), Reference(checkpoint.config, read or checkpoint.read), sequences, "fingerprint", CALIBRATION)
    return Statistics(folder / "calibration.safetensors")


def test_every_linears_site_holds_what_enters_it_in_transformers(tmp_path: Path, checkpoint: Checkpoint, inputs: Inputs) -> None:
    statistics = measured(tmp_path, checkpoint, text())
    assert len(inputs) == checkpoint.config.num_hidden_layers * len(linear_shapes(checkpoint.config))
    for module, sequences in inputs.items():
        site, behind = statistics.of(site_of(module)), np.concatenate([values[1:] for values in sequences])
        np.testing.assert_allclose(site.absmax, np.abs(np.concatenate(sequences)).max(axis=0), atol=1e-5)
        np.testing.assert_allclose(site.mean_square, np.square(behind).mean(axis=0), rtol=1e-4)
        np.testing.assert_allclose(site.samples, behind, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(site.first, sequences[0][:1], rtol=1e-3, atol=1e-5)


def test_position_0_of_every_sequence_is_kept_where_they_begin_differently(tmp_path: Path, checkpoint: Checkpoint, inputs: Inputs) -> None:
    site = measured(tmp_path, checkpoint, text(bos=None)).of("model.layers.1.mlp.down_proj")
    rows = np.concatenate([values[:1] for values in inputs["model.layers.1.mlp.down_proj"]])
    np.testing.assert_allclose(site.first, rows, rtol=1e-3, atol=1e-5)


def test_header_says_what_was_measured_on_what(tmp_path: Path, checkpoint: Checkpoint) -> None:
    statistics = measured(tmp_path, checkpoint, text())
    expected = {"text": "t.txt", "sha256": "abc", "documents": "1", "sequences": "3", "tokens": "60", "length": "40", "samples": "57", "seed": "0"}
    assert statistics.metadata == expected | {"format": "pt", "model": "fingerprint", "part_samples": "39 2 16"}


def test_each_part_of_the_text_has_its_own_largest_values(tmp_path: Path, checkpoint: Checkpoint, inputs: Inputs) -> None:
    site = measured(tmp_path, checkpoint, text()).of("model.layers.1.mlp.down_proj")
    assert site.part_absmax is not None
    expected = [np.abs(values[1:]).max(axis=0) for values in inputs["model.layers.1.mlp.down_proj"]]
    np.testing.assert_allclose(site.part_absmax, expected, rtol=1e-4, atol=1e-6)
    assert site.part_samples == tuple(len(values) - 1 for values in inputs["model.layers.1.mlp.down_proj"])


def test_report_counts_the_file_and_names_the_largest_activation(tmp_path: Path, checkpoint: Checkpoint, inputs: Inputs) -> None:
    report = write_statistics(StepContext(tmp_path), Reference(checkpoint.config, checkpoint.read), text(), "fingerprint", CALIBRATION)
    assert report["bytes"] == (tmp_path / report["file"]).stat().st_size
    largest = {module: max(float(np.abs(values).max()) for values in sequences) for module, sequences in inputs.items()}
    assert report["largest"]["name"] == site_of(max(largest, key=lambda module: largest[module]))
    assert report["largest"]["value"] == pytest.approx(max(largest.values()), rel=1e-5)


def test_rows_are_all_that_are_not_first_or_drawn_from_all_sequences_alike() -> None:
    assert [rows.tolist() for rows in choose_rows([4, 1, 3])] == [[1, 2, 3], [], [1, 2]]
    drawn = choose_rows([1001, 1, 3001], samples=400)
    assert sum(map(len, drawn)) == 400
    assert 60 < len(drawn[0]) < 140  # a quarter
    for rows in drawn:
        assert len(set(rows.tolist())) == len(rows)
        assert not len(rows) or 1 <= rows.min() <= rows.max() <= 3000
    assert all(np.array_equal(one, other) for one, other in zip(drawn, choose_rows([1001, 1, 3001], samples=400), strict=True))


def test_as_many_rows_are_written_as_were_drawn(tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    monkeypatch.setattr(calibration.choose_rows, "__defaults__", (10,))
    site = measured(tmp_path, checkpoint, text()).of("model.layers.0.self_attn.qkv_proj")
    assert site.samples.shape == (10, site_widths(checkpoint.config)["self_attn.qkv_proj"])
    behind = np.concatenate([values[1:] for values in inputs["model.layers.0.self_attn.q_proj"]])
    np.testing.assert_allclose(site.mean_square, np.square(behind).mean(axis=0), rtol=1e-4)  # of all rows


def damaged(checkpoint: Checkpoint, name: str, damage: Callable[[Tensor], Tensor]) -> Callable[[str], Tensor]:
    return lambda asked: damage(checkpoint.read(asked).float().clone()) if asked == name else checkpoint.read(asked)


def nan_row(weight: Tensor) -> Tensor:
    weight[20] = float("nan")
    return weight


def huge_row(weight: Tensor) -> Tensor:
    weight[5] = 3e38
    return weight


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (EMBEDDING, nan_row, r"input of model\.layers\.0\.self_attn\.qkv_proj is nan at token 17 of calibration sequence 0"),
        ("model.layers.1.mlp.up_proj.weight", huge_row, r"input of model\.layers\.1\.mlp\.down_proj is -?inf at token \d+ of .* \(channel 5\)"),
        (
            "model.layers.1.mlp.up_proj.weight",
            lambda weight: weight * 1e9,
            r"input of model\.layers\.1\.mlp\.down_proj reaches .* at token 0 .*float16 holds 65,504",
        ),
    ],
    ids=["NaN", "Inf", "beyond float16"],
)
def test_refuses_activations_that_float16_can_not_hold(
    name: str, damage: Callable[[Tensor], Tensor], message: str, tmp_path: Path, checkpoint: Checkpoint
) -> None:
    with pytest.raises(QuantizationError, match=message) as caught:
        measured(tmp_path, checkpoint, text(), damaged(checkpoint, name, damage))
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_disk_that_is_too_small_before_anything_is_computed(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(QuantizationError, match=r"calibration\.safetensors takes 0\.00 GB, 0\.00 GB are free") as caught:
        measured(tmp_path, checkpoint, text(), damaged(checkpoint, EMBEDDING, nan_row))
    assert caught.value.hint


def test_weights_of_one_layer_at_a_time_are_read(tmp_path: Path, checkpoint: Checkpoint) -> None:
    names: list[str] = []
    measured(tmp_path, checkpoint, text(), lambda name: (names.append(name), checkpoint.read(name))[1])
    layers = [name.split(".")[2] for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert len(names) == len(set(names))


def test_an_artifacts_weights_are_the_checkpoints(sound_artifact: Path, checkpoint: Checkpoint) -> None:
    read = artifact_reader(sound_artifact)
    for name in tensor_shapes(checkpoint.config):
        assert torch.equal(read(name), checkpoint.read(name))
    with pytest.raises(ArtifactError, match="holds no rotary"):
        read("rotary")


def test_a_weight_file_that_is_gone_is_named(artifact: Path) -> None:
    read = artifact_reader(artifact)
    (artifact / "weights" / "layer-001.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has no weights/layer-001\.safetensors, which holds model\.layers\.1"):
        read("model.layers.1.mlp.up_proj.weight")
