"""Checkpoints that llm-compressor and ModelOpt wrote (quantised/make_checkpoints.py), read bit for bit; and what is wrong with altered ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from artifact.errors import CheckpointError, ExportError
from artifact.layout import layer_prefix
from exporter.checkpoints import open_checkpoint
from exporter.checkpoints.lora_model import with_adapter
from exporter.checkpoints.pre_quant_scale import fold
from exporter.checkpoints.protocol import InFiles
from exporter.checkpoints.quantised_model import QuantisedCheckpoint
from exporter.checkpoints.request import CheckpointRequest
from exporter.in_place import check_in_place
from exporter.model import DecoderLayer, attention_allowed
from exporter.rope import rotary_tables

PINNED = Path(__file__).parent / "quantised"
READ = sorted(path.parent.name for path in PINNED.glob("*/expected.json"))
LAYER = "model.layers.0"
Q, OUT, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"
Alter = Callable[..., Path]


@pytest.fixture
def alter(tmp_path: Path) -> Alter:
    """``alter(name, tensors, quantization)``: a pinned checkpoint with some tensors replaced (None: left out), and keys of its configuration."""

    def make(name: str, tensors: dict[str, Tensor | None] | None = None, **quantization: Any) -> Path:
        folder = Path(shutil.copytree(PINNED / name, tmp_path / name))
        stored = load_file(folder / "model.safetensors") | (tensors or {})
        save_file({key: tensor for key, tensor in stored.items() if tensor is not None}, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= quantization
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def opened(path: Path) -> QuantisedCheckpoint:
    checkpoint = open_checkpoint(str(path))
    assert isinstance(checkpoint, QuantisedCheckpoint)
    return checkpoint


@pytest.mark.parametrize("name", READ)
def test_levels_times_scales_are_what_the_tool_makes_of_them(name: str) -> None:
    checkpoint = opened(PINNED / name)
    expected = json.loads((PINNED / name / "expected.json").read_text())
    assert expected.keys() == checkpoint.linears.keys()
    for module, linear in checkpoint.linears.items():
        rows = linear.rows(0, linear.shape[0])
        assert hashlib.sha256(rows.numpy().tobytes()).hexdigest() == expected[module], module


@pytest.mark.parametrize("name", READ)
def test_rows_are_those_of_the_whole_weight(name: str) -> None:
    checkpoint = opened(PINNED / name)
    for weight, shape in checkpoint.shapes.items():
        whole = checkpoint.read(weight)
        assert whole.shape == shape
        for start, stop in ((0, 1), (1, 4), (3, shape[0])):
            assert torch.equal(checkpoint.read_rows(weight, start, stop), whole[start:stop]), (weight, start, stop)


def test_says_what_it_is() -> None:
    checkpoint = opened(PINNED / "w8a8-dynamic")
    assert checkpoint.format == "compressed-tensors int-quantized"
    assert checkpoint.given.quantized == 7
    assert (checkpoint.dtypes[f"{Q}.weight"], checkpoint.dtypes["lm_head.weight"]) == ("INT8", "BF16")
    notes = "\n".join(checkpoint.notes)
    assert "quantised: compressed-tensors int-quantized: int8 weights, a scale a row; int8 activations, a scale a token; 7 linears" in notes
    assert "calibrates one static scale a linear instead" in notes
    assert "float in the checkpoint: lm_head" in notes


def test_config_of_an_artifact_says_nothing_of_a_quantisation(tmp_path: Path) -> None:
    from artifact.steps import StepContext

    names = opened(PINNED / "w8a16-pack").write_sidecars(StepContext(tmp_path).write)
    config = json.loads((tmp_path / "config.json").read_text())
    assert names == ["config.json"]
    assert "quantization_config" not in config
    assert config["hidden_size"] == 32


def test_no_weight_that_is_computed_has_a_place() -> None:
    checkpoint = opened(PINNED / "modelopt-w8a8")
    assert isinstance(checkpoint, InFiles)
    assert checkpoint.place(f"{Q}.weight") is None
    assert checkpoint.place(f"{LAYER}.input_layernorm.weight") is None  # it takes the pre_quant_scale
    assert checkpoint.place("model.norm.weight") is not None


def test_weights_reference_is_refused() -> None:
    with pytest.raises(ExportError, match=r"takes a folder of safetensors; this checkpoint is modelopt W8A16"):
        check_in_place(opened(PINNED / "modelopt-w8a16"), CheckpointRequest("x"), None, "fp16")


def test_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="an adapter can't be merged into a quantised checkpoint") as caught:
        with_adapter(opened(PINNED / "w8a16-pack"), tmp_path)
    assert "original" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["w8a16-tensor", "w8a16-pack", "w4a16-pack"])
def test_scales_spread_over_rows_and_groups(name: str) -> None:
    checkpoint = opened(PINNED / name)
    scales, linear = checkpoint.scales(DOWN, 0, 32), checkpoint.linears[DOWN]
    assert scales.shape == (32, 2 if name == "w4a16-pack" else 1)
    expected = linear.levels(0, 32).float() * scales.repeat_interleave(linear.shape[1] // scales.shape[1], dim=1)
    assert torch.equal(checkpoint.read(f"{DOWN}.weight"), expected)


CASES: list[tuple[str, dict[str, Tensor | None], dict[str, Any], str]] = [
    ("w8a16-pack", {f"{Q}.weight_scale": None}, {}, f"{Q}: weight_scale is missing; there are weight_packed, weight_shape"),
    ("w8a8-static", {f"{Q}.input_scale": None}, {}, f"{Q}: input_scale is missing"),
    ("w8a16-pack", {f"{Q}.weight_packed": None, f"{Q}.weight": torch.ones(32, 32)}, {}, f"{Q}: weight_packed is missing"),
    ("w8a16-pack", {f"{Q}.weight_g_idx": torch.arange(32)}, {}, f"{Q}: weight_g_idx is there: columns in another order"),
    ("w8a16-pack", {f"{Q}.weight_packed": torch.ones(32, 8)}, {}, f"{Q}: weight_packed is F32, expected I32"),
    ("w8a16-pack", {f"{Q}.weight_packed": torch.ones(32, 4, dtype=torch.int32)}, {}, r"weight_packed is \[32, 4\], expected \[32, 8\]"),
    ("w8a16-pack", {f"{Q}.weight_shape": torch.tensor([32, 31])}, {}, r"weight_shape is \[32, 31\], config.json asks for \[32, 32\]"),
    ("w8a16-pack", {f"{Q}.weight_scale": torch.ones(31, 1)}, {}, r"weight_scale is \[31, 1\], expected \[32, 1\] or \[32\]"),
    ("w4a16-pack", {f"{DOWN}.weight_scale": torch.ones(32, 1)}, {}, r"weight_scale is \[32, 1\], expected \[32, 2\]"),
    ("w8a16-pack", {f"{Q}.weight_scale": torch.ones(32, 1, dtype=torch.int32)}, {}, "weight_scale is I32, expected one of F16, BF16, F32"),
    ("w8a8-static", {f"{Q}.input_scale": torch.ones(32)}, {}, r"input_scale is \[32\], expected \[1\]"),
    ("modelopt-w8a8", {f"{Q}.pre_quant_scale": torch.ones(31)}, {}, r"pre_quant_scale is \[31\], expected \[32\]"),
    ("modelopt-w8a8", {f"{Q}.pre_quant_scale": -torch.ones(32)}, {}, "pre_quant_scale: not all of 32 numbers are finite and positive"),
    ("modelopt-w4a16", {f"{Q}.weight": torch.ones(15, 32, dtype=torch.uint8)}, {}, r"weight is \[15, 32\], expected \[16, 32\]"),
    ("w8a16-naive", {f"{Q}.weight_zero_point": torch.ones(32, 1, dtype=torch.int8)}, {}, "weight_zero_point is not zero: asymmetric"),
    ("w4a16-asymmetric", {}, {}, r"config_groups.group_0.weights is asymmetric"),
    ("w8a16-pack", {}, {"ignore": ["lm_head", Q]}, f"says that {Q} stays float, and the checkpoint has {Q}.weight_packed"),
    ("w8a16-naive", {}, {"ignore": ["lm_head", Q]}, f"says that {Q} stays float, and the checkpoint has {Q}.weight_scale"),
    (
        "w8a16-pack",
        {"model.embed_tokens.weight": torch.ones(32, 32, dtype=torch.int8)},
        {},
        "nothing of model.embed_tokens.weight, which is stored as I8",
    ),
    ("w8a16-pack", {f"{Q}.weight_scale_2": torch.ones(1)}, {}, f"extra tensor {Q}.weight_scale_2"),
]


@pytest.mark.parametrize(("name", "tensors", "quantization", "reason"), CASES, ids=[case[3][:40] for case in CASES])
def test_altered_checkpoint_is_refused(alter: Alter, name: str, tensors: dict[str, Tensor | None], quantization: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(str(alter(name, tensors, **quantization)))
    assert caught.value.hint or "pre_quant_scale" in reason


def test_configuration_that_excludes_every_linear_is_refused(alter: Alter) -> None:
    floats = load_file(PINNED / "w8a16-naive" / "model.safetensors")
    halves = {name: tensor.half() if name.endswith("proj.weight") else None if name.endswith("_scale") else tensor for name, tensor in floats.items()}
    with pytest.raises(CheckpointError, match="is quantised, and excludes every linear"):
        open_checkpoint(str(alter("w8a16-naive", halves, ignore=["Linear"])))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_that_is_not_finite_and_positive_is_refused_when_it_is_read(alter: Alter, bad: float) -> None:
    scale = load_file(PINNED / "w8a16-pack" / "model.safetensors")[f"{Q}.weight_scale"]
    scale[5] = bad
    checkpoint = opened(alter("w8a16-pack", {f"{Q}.weight_scale": scale}))
    assert checkpoint.read_rows(f"{Q}.weight", 0, 5).shape == (5, 32)
    with pytest.raises(CheckpointError, match=rf"{Q}\.weight_scale: 1 of 27 scales are not finite and positive"):
        checkpoint.read_rows(f"{Q}.weight", 5, 32)


def test_zero_points_of_zero_are_symmetric(alter: Alter) -> None:
    checkpoint = opened(alter("w8a16-naive", {f"{Q}.weight_zero_point": torch.zeros(32, 1, dtype=torch.int8)}))
    assert torch.equal(checkpoint.read(f"{Q}.weight"), opened(PINNED / "w8a16-naive").read(f"{Q}.weight"))


def test_bin_files_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PINNED / "w8a16-naive", tmp_path / "bin"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="read from safetensors alone"):
        open_checkpoint(str(folder))


def run_layer(weights: Callable[[str], Tensor], scales: dict[str, Tensor], checkpoint: QuantisedCheckpoint) -> Tensor:
    """A decoder layer in float64, its linears reading x · p where there is a p."""
    layer = DecoderLayer(checkpoint.config).double()
    layer.load_state_dict({name: weights(f"{LAYER}.{name}").double() for name in layer.state_dict()})
    for module, scale in scales.items():
        part = layer.get_submodule(module.removeprefix(f"{LAYER}."))
        part.register_forward_pre_hook(lambda _, inputs, scale=scale: (inputs[0] * scale.double(),))  # type: ignore[misc]
    state = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 6, 32)))
    cos, sin = (table[None, None, :6] for table in rotary_tables(checkpoint.config, torch.float64))
    empty = torch.zeros(1, 2, 0, 8, dtype=torch.float64)
    with torch.no_grad():
        return layer(state, cos, sin, attention_allowed(torch.ones(1, 6, dtype=torch.int64), 6), (empty, empty))[0]


@pytest.mark.parametrize("name", ["modelopt-w8a8", "modelopt-w4a16"])
def test_pre_quant_scale_is_folded_without_changing_the_layer(name: str) -> None:
    checkpoint = opened(PINNED / name)
    stored = load_file(PINNED / name / "model.safetensors")
    scales = {module: stored[f"{module}.pre_quant_scale"].float() for module in checkpoint.linears if f"{module}.pre_quant_scale" in stored}
    assert DOWN in scales

    def as_stored(weight: str) -> Tensor:
        module = weight.removesuffix(".weight")
        return checkpoint.linears[module].rows(0, checkpoint.shapes[weight][0]) if module in checkpoint.linears else stored[weight]

    expected, folded = run_layer(as_stored, scales, checkpoint), run_layer(checkpoint.read, {}, checkpoint)
    unfolded = run_layer(as_stored, {}, checkpoint)
    assert (folded - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (unfolded - expected).abs().max() > 1e-3 * expected.abs().max()


def test_pre_quant_scale_goes_to_norms_and_rows_and_else_into_columns() -> None:
    config = opened(PINNED / "modelopt-w8a8").config
    prefix, vector = f"{layer_prefix(0)}.", torch.arange(1.0, 33.0)
    shared = torch.arange(1.0, 17.0).view(2, 1, 8).expand(2, 2, 8).flatten()
    same = {f"{prefix}self_attn.{name}_proj": vector for name in "qkv"}
    folded = fold(config, same | {OUT: shared, DOWN: torch.ones(64) * 3})
    assert torch.equal(folded.rows[f"{prefix}input_layernorm"], vector)
    assert torch.equal(folded.rows[f"{prefix}self_attn.v_proj"], torch.arange(1.0, 17.0))
    assert torch.equal(folded.rows[f"{prefix}mlp.up_proj"], torch.ones(64) * 3)
    assert not folded.columns
    apart = fold(config, {**same, f"{prefix}self_attn.k_proj": vector + 1, OUT: vector})
    assert not apart.rows
    assert apart.columns.keys() == {*same, OUT}
    assert fold(config, {Q: vector}).columns.keys() == {Q}  # k and v read the same norm, and have no p


def test_linear_that_takes_a_pre_quant_scale_into_its_columns_has_no_levels() -> None:
    checkpoint = opened(PINNED / "modelopt-w4a16")
    assert OUT in checkpoint.folded.columns
    assert OUT not in checkpoint.usable
    assert len(checkpoint.usable) == 6
    assert any("pre_quant_scale differs" in note and OUT in note for note in checkpoint.notes)
