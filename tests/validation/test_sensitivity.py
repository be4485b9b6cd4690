"""What linears cost alone and together, against the same model quantised in the open, whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from artifact.layout import members, tensor_shapes
from exporter.checkpoints import Checkpoint
from exporter.model import LlamaModel
from exporter.rope import rotary_tables
from graphs.quantize.int8 import quantize_rows
from validation import metrics, sensitivity
from validation.bootstrap import Resampling
from validation.fake_quant import Form, quantised
from validation.joint_cost import JointCost
from validation.perplexity import make_windows
from validation.reference import Reference
from validation.sensitivity import cost_of, score_linears

IDS = np.random.default_rng(0).integers(0, 64, (2, 24))
SITES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{site}" for layer in range(2) for site in SITES]
LEVELS = 7
"""Coarse, so that the tiny model's costs stand clear of rounding."""


class Coarse(Form):
    """A weight of few levels."""

    def weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        step = weight.abs().amax() / LEVELS
        return (weight / step).round() * step


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Reference:
    return Reference(checkpoint.config, checkpoint.read)


def logits(checkpoint: Checkpoint, names: list[str], ids: np.ndarray) -> np.ndarray:
    """[S·L, V] of the whole model, the weights of some linears made coarse."""
    model = LlamaModel(checkpoint.config).eval()
    cos, sin = rotary_tables(checkpoint.config, torch.float32)
    weights = {name: checkpoint.read(name).float() for name in tensor_shapes(checkpoint.config)}
    for name in names:
        for member in members(name):
            weight = f"{member}.weight"
            weights[weight] = Coarse().weight(weight, weights[weight])
    model.load_state_dict(weights | {"model.rotary_emb.cos": cos, "model.rotary_emb.sin": sin})
    rows, length = ids.shape
    past = [(torch.zeros(rows, checkpoint.config.num_key_value_heads, 0, checkpoint.config.head_dim),) * 2] * 2
    with torch.inference_mode():
        found, _ = model(torch.from_numpy(ids), torch.ones(rows, length, dtype=torch.int64), torch.arange(length).expand(rows, -1), past)
    return found.flatten(0, 1).numpy()


@pytest.mark.parametrize("state_bytes", [1 << 30, 1], ids=["one pass", "a pass for every layer"])
def test_each_linear_alone_costs_what_the_whole_model_says(
    state_bytes: int, reference: Reference, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "STATE_BYTES", state_bytes)
    scores = score_linears(reference, IDS, {name: Coarse() for name in NAMES})
    exact = logits(checkpoint, [], IDS)
    assert list(scores) == NAMES
    for name, score in scores.items():
        expected = metrics.kl_divergence(logits(checkpoint, [name], IDS), exact).reshape(IDS.shape)[:, IDS.shape[1] // 2 :].ravel()
        assert score.kl == pytest.approx(expected.mean(), rel=1e-3)
        assert score.kl_se == pytest.approx(Resampling([len(expected)]).means(expected).std(ddof=1), rel=1e-2)
        assert score.kl > 1e-6


@pytest.mark.parametrize("spread", [1e-3, 0.3, 4.0])
def test_divergence_is_that_of_the_metrics_however_small_or_large(spread: float) -> None:
    generator = np.random.default_rng(3)
    exact = (4 * generator.standard_normal((9, 500))).astype(np.float32)
    varied = exact + (spread * generator.standard_normal((9, 500))).astype(np.float32)
    p = np.exp(exact.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    q = np.exp(varied.astype(np.float64))
    expected = (p * (np.log(p) - np.log(q / q.sum(axis=1, keepdims=True)))).sum(axis=1)
    found = sensitivity.divergence(torch.from_numpy(p.astype(np.float32)), torch.from_numpy(exact), torch.from_numpy(varied))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(each), dim=-1) for each in (exact, varied))
    np.testing.assert_allclose(sensitivity.divergence(log_p.exp(), log_p, log_q).numpy(), expected, rtol=1e-3)


def test_weights_are_read_once_a_pass(checkpoint: Checkpoint) -> None:
    read: list[str] = []
    reference = Reference(checkpoint.config, lambda name: (read.append(name), checkpoint.read(name))[1])
    score_linears(reference, IDS, {name: Coarse() for name in NAMES})
    layers = [name for name in read if ".layers." in name]
    assert len(layers) == len(set(layers))


@pytest.mark.parametrize("state_bytes", [1 << 30, 1], ids=["one pass", "a pass for every layer"])
def test_the_cost_that_is_said_before_is_what_is_done(state_bytes: int, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "STATE_BYTES", state_bytes)
    runs = 0
    advance = Reference.advance

    def counting(*arguments: object) -> object:
        nonlocal runs
        runs += 1
        return advance(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Reference, "advance", counting)
    told: list[tuple[str, int, int]] = []
    score_linears(reference, IDS, {name: Coarse() for name in NAMES}, lambda *said: told.append(said))
    cost = cost_of(reference.config, NAMES, IDS.size)
    assert runs == cost.layer_runs
    assert cost.passes == (1 if state_bytes > 1 else 2)
    assert told[0] == (f"sensitivity: {cost.words}", 0, cost.layer_runs)
    assert f"{cost.layer_runs} runs of a layer" in cost.words


def test_a_set_costs_together_what_the_whole_model_says(reference: Reference, checkpoint: Checkpoint) -> None:
    names = [NAMES[0], NAMES[3], NAMES[6]]
    tokens = IDS.ravel()
    windows = make_windows(tokens, 40, 20, None)
    measured = JointCost(reference, windows).measure({name: Coarse() for name in names})
    kl, difference = [], []
    for window in windows:
        exact, coarse = (logits(checkpoint, chosen, window.inputs[None])[-len(window.targets) :] for chosen in ([], names))
        kl.append(metrics.kl_divergence(coarse, exact))
        nll = [metrics.negative_log_likelihoods(each, window.targets) for each in (coarse, exact)]
        difference.append(nll[0] - nll[1])
    assert measured.tokens == 40
    assert measured.kl == pytest.approx(np.concatenate(kl).mean(), rel=1e-3)
    assert measured.increase_pct == pytest.approx(100 * np.expm1(np.concatenate(difference).mean()), rel=1e-2)
    draws = Resampling([40]).means(np.concatenate(difference))
    assert measured.increase_se_pct == pytest.approx(100 * np.expm1(draws).std(ddof=1), rel=1e-2)
    assert measured.kl_se == pytest.approx(Resampling([40]).means(np.concatenate(kl)).std(ddof=1), rel=1e-2)


def test_nothing_quantised_costs_nothing(reference: Reference) -> None:
    measured = JointCost(reference, make_windows(IDS.ravel(), 40, 20, None)).measure({})
    assert (measured.kl, measured.increase_pct) == (0.0, 0.0)


def test_a_layer_is_as_it_was_after_it_was_quantised(reference: Reference) -> None:
    layer = reference.decoder_layer(0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with quantised(layer, {NAMES[0]: Form(activation_scale=0.1), NAMES[3]: Form()}) as errors:
        assert not torch.equal(layer.state_dict()["mlp.down_proj.weight"], before["mlp.down_proj.weight"])
        assert layer.self_attn.v_proj._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert not layer.self_attn.v_proj._forward_pre_hooks
    assert 0 < errors[NAMES[3]] < 0.02


def test_a_form_rounds_a_weight_and_undoes_its_columns() -> None:
    generator = np.random.default_rng(1)
    weight, columns = generator.standard_normal((6, 8)).astype(np.float32), np.exp(generator.standard_normal(8)).astype(np.float32)
    levels, scale = quantize_rows(weight * columns, np.dtype("float32"))
    found = Form(columns).weight("w", torch.from_numpy(weight))
    np.testing.assert_allclose(found.numpy(), levels * scale[:, None] / columns, rtol=1e-6)


def test_a_form_rounds_inputs_to_its_scale_and_saturates() -> None:
    columns = np.array([1.0, 4.0], np.float32)
    values = torch.tensor([[0.26, 1.04], [100.0, -100.0]])
    found = Form(columns, activation_scale=0.5).input(values)
    assert found.tolist() == [[0.5, 2.0], [0.5 * 127, -100.0]]
    assert torch.equal(Form(columns).input(values), values)
    assert Form(activation_scale=0.25).input(torch.tensor([[-1000.0]])).tolist() == [[-32.0]]
