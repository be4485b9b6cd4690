"""graphs/quantize/scaling.py: a folded graph computes what the unfolded one does, whatever is folded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import QuantizationError
from artifact.layout import PACKED, layer_prefix
from artifact.manifest import read_manifest
from artifact.steps import run_step
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from graphs.pipeline import fuse_artifact
from graphs.quantize.linears import find_linears
from graphs.quantize.scaling import NORMS, ROWS, Scaling, divide_norm, fold

LAYERS = 2
PREFIX = layer_prefix(0)
SITES = (*NORMS, *ROWS.values())
VARIANTS = {
    "grouped": {},
    "multi-head-wide-biased": {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(scope="module", params=VARIANTS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    """A fused float32 artifact."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = open_checkpoint(str(make_checkpoint(folder / "checkpoint", num_hidden_layers=LAYERS, **VARIANTS[request.param])))
    run_step(folder / "artifact", "export", {}, lambda step: export_checkpoint(step, checkpoint, dtype="fp32"))
    run_step(folder / "artifact", "fuse", {}, fuse_artifact)
    return folder / "artifact"


def config_of(artifact: Path) -> LlamaConfig:
    return LlamaConfig(**read_manifest(artifact)["model"]["config"])


def vectors(config: LlamaConfig, names: tuple[str, ...] = SITES) -> dict[str, np.ndarray]:
    """Random factors between 1/4 and 4 for these sites of every layer."""
    rng = np.random.default_rng(0)
    width = {"mlp.down_proj": config.intermediate_size}
    found = {}
    for layer in range(config.num_hidden_layers):
        for name in names:
            found[f"{layer_prefix(layer)}.{name}"] = (4 ** rng.uniform(-1, 1, width.get(name, config.hidden_size))).astype(np.float32)
            if name == "self_attn.o_proj":
                n_kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
                one = 4 ** rng.uniform(-1, 1, (n_kv_heads, 1, config.head_dim))
                found[f"{layer_prefix(layer)}.{name}"] = np.repeat(one, group, axis=1).ravel().astype(np.float32)
    return found


def folded(artifact: Path, scaling: Scaling) -> ir.Model:
    """fused.onnx with its linears, biases and norms as the scaling says."""
    model = load(artifact)
    changed = dict(scaling.norms)
    for linear in find_linears(model.graph):
        changed[f"{linear.name}.weight"] = scaling.weight(linear.name, linear.weight.const_value.numpy())
        bias = model.graph.initializers.get(f"{linear.name}.bias")
        if bias is not None:
            changed[str(bias.name)] = scaling.bias(linear.name, bias.const_value.numpy())
    for name, array in changed.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return model


def load(artifact: Path) -> ir.Model:
    model = ir.load(artifact / "fused.onnx")
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    return model


def outputs(model: ir.Model, config: LlamaConfig, path: Path) -> dict[str, np.ndarray]:
    """A prefill of 2 × 5 tokens."""
    ir.save(model, path)
    rng = np.random.default_rng(1)
    feeds = {
        io_spec.INPUT_IDS: rng.integers(0, config.vocab_size, (2, 5)),
        io_spec.ATTENTION_MASK: np.ones((2, 5), np.int64),
        io_spec.POSITION_IDS: np.arange(5)[None].repeat(2, axis=0),
    }
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    empty = np.zeros((2, config.num_key_value_heads, 0, config.head_dim), np.float32)
    feeds |= {value.name: empty for value in session.get_inputs() if value.name not in feeds}
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.mark.trace
@pytest.mark.parametrize("names", [*[(name,) for name in SITES], SITES], ids="+".join)
def test_folded_graph_equals_the_unfolded_one(artifact: Path, names: tuple[str, ...], tmp_path: Path) -> None:
    config, original = config_of(artifact), load(artifact)
    scaling = fold(config, vectors(config, names), lambda name: original.graph.initializers[name].const_value.numpy())
    expected = outputs(original, config, tmp_path / "original.onnx")
    scaled = folded(artifact, scaling)
    new = scaled.graph.initializers
    assert any((new[name].const_value.numpy() != old.const_value.numpy()).any() for name, old in original.graph.initializers.items())
    got = outputs(scaled, config, tmp_path / "folded.onnx")
    for name, value in expected.items():
        factor = np.float32(1)
        if name.endswith("value") and "self_attn.o_proj" in names:  # the cache holds what v_proj makes
            site = f"{layer_prefix(int(name.split('.')[1]))}.self_attn.o_proj"
            factor = scaling.vectors[site].reshape(config.num_key_value_heads, -1, config.head_dim)[:, :1]
        np.testing.assert_allclose(got[name] * factor, value, rtol=1e-5, atol=1e-5 * np.abs(value).max())


CONFIG = LlamaConfig(
    hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=2, vocab_size=5,
    max_position_embeddings=16, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=True,
)  # fmt: skip


def test_rows_of_a_packed_projection_are_those_of_its_members() -> None:
    scaling = Scaling(CONFIG, vectors(CONFIG))
    for packed, members in PACKED.items():
        alone = [scaling.rows(f"{PREFIX}.{member}") for member in members]
        widths = {"self_attn.q_proj": 8, "self_attn.k_proj": 4, "mlp.gate_proj": 12}
        joined = [np.ones(widths[member], np.float32) if rows is None else rows for member, rows in zip(members, alone, strict=True)]
        assert [rows is None for rows in alone] == [member not in ROWS for member in members]
        np.testing.assert_array_equal(scaling.rows(f"{PREFIX}.{packed}"), np.concatenate(joined))


def test_rows_in_blocks_are_scaled_as_the_whole() -> None:
    scaling = Scaling(CONFIG, vectors(CONFIG))
    weight = np.random.default_rng(2).standard_normal((24, 8)).astype(np.float16)
    module = f"{PREFIX}.mlp.gate_up_proj"
    whole = scaling.weight(module, weight)
    np.testing.assert_array_equal(np.concatenate([scaling.weight(module, weight[at : at + 5], at) for at in range(0, 24, 5)]), whole)
    assert (weight.dtype, whole.dtype) == (np.float16, np.float32)


def test_nothing_to_scale_leaves_a_weight_as_it_is() -> None:
    weight = np.random.default_rng(3).standard_normal((5, 8)).astype(np.float16)
    for module in ("lm_head", f"{PREFIX}.self_attn.q_proj"):
        np.testing.assert_array_equal(Scaling(CONFIG).weight(module, weight), weight)
        np.testing.assert_array_equal(Scaling(CONFIG).bias(module, weight[:, 0]), weight[:, 0])


def test_columns_take_the_ratio_that_a_rounded_norm_leaves() -> None:
    rng = np.random.default_rng(4)
    old, wanted = rng.standard_normal(64).astype(np.float16), rng.uniform(0.3, 3, 64).astype(np.float32)
    old[3] = 0
    new, real = divide_norm("n", old, wanted)
    assert new.dtype == np.float16
    np.testing.assert_allclose(new.astype(np.float32) * real, old.astype(np.float32), rtol=1e-6)
    np.testing.assert_allclose(np.delete(real, 3), np.delete(wanted, 3), rtol=1e-3)
    assert (real[3], new[3]) == (1, 0)  # nothing comes through this channel


@pytest.mark.parametrize("factor", [1e-6, 1e8])
def test_refuses_a_norm_that_leaves_the_range_of_its_dtype(factor: float) -> None:
    with pytest.raises(QuantizationError, match=r"input_layernorm\.weight: 2 ÷ .* in channel 1 is out of float16's range"):
        divide_norm("input_layernorm.weight", np.array([0, 2], np.float16), np.full(2, factor, np.float32))


@pytest.mark.parametrize(
    ("site", "vector", "message"),
    [
        ("mlp.up_proj", np.ones(8), "no site that can be scaled"),
        ("mlp.down_proj", np.ones(8), r"expected \(12,\)"),
        ("mlp.down_proj", np.zeros(12), "finite positive numbers"),
        ("mlp.down_proj", np.full(12, np.nan), "finite positive numbers"),
        ("self_attn.o_proj", np.arange(1, 9), "are scaled apart"),
    ],
)
def test_refuses_what_can_not_be_folded(site: str, vector: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scaling(CONFIG, {f"{PREFIX}.{site}": vector.astype(np.float32)})


def test_refuses_a_site_outside_the_layers() -> None:
    with pytest.raises(ValueError, match="lm_head is no site that can be scaled"):
        Scaling(CONFIG, {"lm_head": np.ones(8, np.float32)})
