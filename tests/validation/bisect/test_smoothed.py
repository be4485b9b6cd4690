"""Factors that smoothing moves within a layer cancel; what does not is found in the weight that should undo it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.layout import layer_shapes
from graphs.quantize.rounding import Grid, largest_over, round_plainly
from graphs.quantize.scaling import fold
from validation.bisect.smoothed import factors_of
from validation.bisect.weight_faults import compare_weight
from validation.bisect.weights import Weight

Floats = NDArray[np.float32]
PREFIX = "model.layers.0."
V_PROJ, O_PROJ, UP, DOWN = (f"{PREFIX}{name}.weight" for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"))
NORM = f"{PREFIX}input_layernorm.weight"


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5,
        rope_theta=1e4, max_position_embeddings=64, vocab_size=64, mlp_bias=True, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(config: LlamaConfig) -> dict[str, Floats]:
    random = np.random.default_rng(0)
    made = {name: random.normal(1 if "norm" in name else 0, 0.1, shape) for name, shape in layer_shapes(config, 0).items()}
    return {name: array.astype(np.float16).astype(np.float32) for name, array in made.items()}


@pytest.fixture
def found(config: LlamaConfig, exact: dict[str, Floats]) -> dict[str, Weight]:
    """The layer as int8-smoothquant writes it; the norm before the mlp, and what reads it, are as they were."""
    random = np.random.default_rng(1)
    heads = np.repeat(np.exp(random.normal(0, 0.7, (2, 1, config.head_dim))), 2, axis=1).ravel()
    vectors = {
        f"{PREFIX}self_attn.qkv_proj": np.exp(random.normal(0, 0.7, 128)),
        f"{PREFIX}self_attn.o_proj": heads,
        f"{PREFIX}mlp.down_proj": np.exp(random.normal(0, 0.7, 192)),
    }
    scaling = fold(config, {site: vector.astype(np.float32) for site, vector in vectors.items()}, lambda name: exact[name].astype(np.float16))
    return {name: _stored(name, array, scaling) for name, array in exact.items()}


def _stored(name: str, array: Floats, scaling: object) -> Weight:
    node, module = ir.node("Identity", []), name.rpartition(".")[0]
    if array.ndim == 1:
        changed = scaling.norms.get(name, array) if "norm" in name else scaling.bias(module, array).astype(np.float16)  # type: ignore[attr-defined]
        return Weight(np.asarray(changed, np.float32), name, node)
    grid = Grid(-127, 127, array.shape[1], largest_over(127, np.dtype(np.float32)))
    levels, scale = round_plainly(scaling.weight(module, array), grid)  # type: ignore[attr-defined]
    return Weight((levels * scale).astype(np.float32), name, node, grid)


def faults_of(config: LlamaConfig, found: dict[str, Weight], exact: dict[str, Floats]) -> dict[str, str]:
    """Weight → what is wrong with it."""
    factors, unknown = factors_of(config, 0, found, exact.__getitem__)
    assert not unknown
    compared = [compare_weight(name, weight, exact[name], factors.get(name)) for name, weight in found.items()]
    return {fault.name: fault.words for fault in compared if fault.share > 1}


def times(weight: Weight, factor: float, place: object = ...) -> Weight:
    array = weight.array.copy()
    array[place] *= np.float32(factor)  # type: ignore[index]
    return Weight(array, weight.initializer, weight.node, weight.grid)


def test_a_sound_layer_is_sound(config: LlamaConfig, found: dict[str, Weight], exact: dict[str, Floats]) -> None:
    assert np.abs(found[O_PROJ].array / exact[O_PROJ] - 1).max() > 1
    assert faults_of(config, found, exact) == {}


@pytest.mark.parametrize(
    ("damaged", "named"), [(V_PROJ, O_PROJ), (O_PROJ, O_PROJ), (UP, DOWN), (DOWN, DOWN), (f"{PREFIX}self_attn.k_proj.weight",) * 2]
)
def test_a_linear_times_one_hundredth_is_found(
    config: LlamaConfig, found: dict[str, Weight], exact: dict[str, Floats], damaged: str, named: str
) -> None:
    """Of values and of up a factor is no fault by itself: it must be undone behind them."""
    found[damaged] = times(found[damaged], 1.01)
    faults = faults_of(config, found, exact)
    faults.pop(f"{PREFIX}mlp.up_proj.bias", None)  # its rows' factors are not its own any more
    assert list(faults) == [named]
    assert ("must undo what" in faults[named]) is (named in (O_PROJ, DOWN, damaged))


def test_half_of_the_columns_damaged_are_found(config: LlamaConfig, found: dict[str, Weight], exact: dict[str, Floats]) -> None:
    """A median over columns would not see them."""
    name = f"{PREFIX}mlp.gate_proj.weight"
    found[name] = times(found[name], -1, np.s_[:, ::2])
    assert list(faults_of(config, found, exact)) == [name]


def test_one_row_of_the_values_and_one_channel_of_a_norm_are_found(config: LlamaConfig, found: dict[str, Weight], exact: dict[str, Floats]) -> None:
    damaged = found | {V_PROJ: times(found[V_PROJ], 1.25, 7)}
    faults = faults_of(config, damaged, exact)
    assert list(faults) == [O_PROJ]
    assert "its columns must undo what self_attn.v_proj was divided by" in faults[O_PROJ]
    faults = faults_of(config, found | {NORM: times(found[NORM], 1.25, 9)}, exact)
    assert set(faults) >= {f"{PREFIX}self_attn.{name}_proj.weight" for name in "qk"}
    assert list(faults_of(config, found | {NORM: times(found[NORM], -1, 9)}, exact))[-1] == NORM


def test_a_bias_is_divided_as_its_rows_are(config: LlamaConfig, found: dict[str, Weight], exact: dict[str, Floats]) -> None:
    name = f"{PREFIX}mlp.up_proj.bias"
    assert not np.allclose(found[name].array, exact[name], rtol=0.01)
    assert list(faults_of(config, found | {name: times(found[name], 1.01, 3)}, exact)) == [name]


def test_a_matrix_that_was_kept_as_a_float_is_compared(config: LlamaConfig, found: dict[str, Weight], exact: dict[str, Floats]) -> None:
    """With the factors of its norm; and where nothing was moved, to the bit."""
    gate, k_proj = (f"{PREFIX}{name}.weight" for name in ("mlp.gate_proj", "self_attn.k_proj"))
    factors, _ = factors_of(config, 0, found, exact.__getitem__)
    moved = factors[k_proj].of(exact[k_proj]).astype(np.float16).astype(np.float32)
    kept = found | {gate: Weight(exact[gate], gate, found[gate].node), k_proj: Weight(moved, k_proj, found[k_proj].node)}
    assert faults_of(config, kept, exact) == {}
    for name in (gate, k_proj):
        faults = faults_of(config, kept | {name: times(kept[name], 1.01, np.s_[3, 4])}, exact)
        assert list(faults) == [name]


def test_what_nothing_says_the_factors_of_is_not_compared(config: LlamaConfig, found: dict[str, Weight], exact: dict[str, Floats]) -> None:
    del found[V_PROJ]
    assert factors_of(config, 0, found, exact.__getitem__)[1] == [O_PROJ]
    del found[NORM]
    assert factors_of(config, 0, found, exact.__getitem__)[1] == [f"{PREFIX}self_attn.{name}_proj.weight" for name in "qk"] + [O_PROJ]


def test_the_factor_of_a_row_is_read_off_its_levels_where_its_largest_weight_alone_decides_its_size(
    config: LlamaConfig, found: dict[str, Weight], exact: dict[str, Floats]
) -> None:
    """A weight a hundred times the others', rounded to the level below the nearest: its size says that the scale is another."""
    wide = exact[UP].copy()
    wide[5] *= np.float32(0.02)
    wide[5, 9] = 1.0
    weight = found[UP]
    assert weight.grid is not None
    factors, _ = factors_of(config, 0, found, exact.__getitem__)
    rows = factors[UP].rows
    assert rows is not None
    wanted = wide * rows[:, None]
    levels, scale = round_plainly(wanted, weight.grid)
    levels[5, 9] = 126
    damaged = found | {UP: Weight((levels * scale).astype(np.float32), UP, weight.node, weight.grid)}
    read = factors_of(config, 0, damaged, (exact | {UP: wide}).__getitem__)[0][UP].rows
    assert read is not None
    np.testing.assert_allclose(read, rows, rtol=1e-5)
