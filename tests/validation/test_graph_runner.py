from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from exporter.checkpoints import Checkpoint
from validation.graph_interface import PROVIDERS, SESSION_ENTRIES
from validation.graph_runner import GraphRunner
from validation.reference import Reference
from validation.scenarios import Scenario, make_scenarios, split_sequences, tokens_needed

pytestmark = pytest.mark.parity
Rewrite = Callable[..., None]


@pytest.fixture(scope="module")
def runner(sound_artifact: Path, config: LlamaConfig) -> GraphRunner:
    return GraphRunner(sound_artifact / "traced.onnx", config, "fp16")


@pytest.fixture(scope="module")
def scenarios(config: LlamaConfig) -> dict[str, Scenario]:
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, tokens_needed(config))
    return {scenario.name: scenario for scenario in make_scenarios(config, *split_sequences(config, tokens, None))}


@pytest.mark.parametrize("name", ["prefill", "decode", "chunked", "padded"])
def test_run_gives_each_row_the_logits_and_caches_it_has_alone(
    name: str, runner: GraphRunner, scenarios: dict[str, Scenario], checkpoint: Checkpoint
) -> None:
    scenario = scenarios[name]
    runs = Reference(checkpoint.config, checkpoint.read).run(scenario.rows)
    for row, run in zip(runner.run(scenario), runs, strict=True):
        assert row.positions.tolist() == list(range(len(row.logits)))
        assert np.abs(row.logits - run.logits()).max() < 0.02
        assert [keys.shape for keys in row.keys] == [keys.shape for keys in run.keys]
        for ours, theirs in zip([*row.keys, *row.values], [*run.keys, *run.values], strict=True):
            assert np.abs(ours - theirs).max() < 0.02


def test_logits_are_those_of_a_prefill(runner: GraphRunner, scenarios: dict[str, Scenario]) -> None:
    assert np.array_equal(runner.logits(scenarios["prefill"].rows[0]), runner.run(scenarios["prefill"])[0].logits)


def test_gathered_takes_positions_and_drops_the_caches(runner: GraphRunner, scenarios: dict[str, Scenario]) -> None:
    (row,) = runner.run(scenarios["chunked"])
    gathered = row.gathered(scenarios["chunked"].last_positions(0))
    assert np.array_equal(gathered.logits, row.logits[gathered.positions])
    assert gathered.keys == []


def rename_output(model: ir.Model) -> None:
    model.graph.outputs[1].name = "present.0.keys"


def retype_input(model: ir.Model) -> None:
    model.graph.inputs[0].dtype = ir.DataType.INT32


def fix_batch(model: ir.Model) -> None:
    model.graph.inputs[1].shape = ir.Shape([1, None])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename_output, r"fused\.onnx: no output present\.0\.key; it has logits, present\.0\.keys, "),
        (
            fix_batch,
            r"fused\.onnx: input attention_mask is tensor\(int64\) \[1, .*\], expected tensor\(int64\) \['batch_size', 'total_sequence_length'\]",
        ),
        (retype_input, r"fused\.onnx: (ONNX Runtime can't load it|input input_ids is tensor\(int32\))"),
    ],
)
def test_runner_refuses_a_graph_that_is_not_the_contracts(
    edit: Callable[[ir.Model], None], message: str, artifact: Path, config: LlamaConfig, rewrite_graph: Rewrite
) -> None:
    rewrite_graph(artifact, edit, to="fused.onnx")
    with pytest.raises(ValidationError, match=message):
        GraphRunner(artifact / "fused.onnx", config, "fp16")


def test_runner_refuses_another_models_graph_and_dtype(sound_artifact: Path, config: LlamaConfig) -> None:
    with pytest.raises(ValidationError, match=r"no input past_key_values\.2\.(key|value)"):
        GraphRunner(sound_artifact / "traced.onnx", replace(config, num_hidden_layers=3), "fp16")
    with pytest.raises(ValidationError, match=r"is tensor\(float16\) .*, expected tensor\(float\)"):
        GraphRunner(sound_artifact / "traced.onnx", config, "fp32")
    with pytest.raises(ValidationError, match="output logits"):
        GraphRunner(sound_artifact / "traced.onnx", config, "fp16", one_position=True)


def test_runner_says_where_onnx_runtime_stopped(runner: GraphRunner, config: LlamaConfig) -> None:
    ids = np.zeros(config.max_position_embeddings + 1, np.int64)
    with pytest.raises(ValidationError, match=r"traced\.onnx: ONNX Runtime stopped at a batch of 1 with 97 positions"):
        runner.logits(ids)


INT8_LINEAR = """
<ir_version: 11, opset_import: ["" : 23]>
linear (float[S, 64] x, int8[64, 64] weight, float[64] scale) => (float[S, 64] y)
{
    float_weight = DequantizeLinear<axis = 0>(weight, scale)
    transposed = Transpose<perm = [1, 0]>(float_weight)
    y = MatMul(x, transposed)
}
"""


def int8_linear() -> tuple[bytes, np.ndarray]:
    """An int8 weight-only linear, and the weight [out, in] it stands for."""
    rng = np.random.default_rng(0)
    weight, scale = rng.integers(-127, 128, (64, 64)).astype(np.int8), rng.uniform(0.5, 2, 64).astype(np.float32)
    model = ir.from_onnx_text(INT8_LINEAR)
    for array in (scale, weight):
        value = model.graph.inputs.pop()
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.initializers.add(value)
    return ir.to_proto(model).SerializeToString(), weight * scale[:, None]


def optimized_operators(model: bytes, entries: dict[str, str], folder: Path) -> set[str]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(model, options, providers=PROVIDERS)
    return {node.op_type for node in ir.load(folder / "optimized.onnx").graph}


def test_session_entries_keep_onnx_runtime_from_quantising_activations(tmp_path: Path) -> None:
    model, weight = int8_linear()
    assert "MatMulNBits" in optimized_operators(model, {}, tmp_path)
    assert optimized_operators(model, SESSION_ENTRIES, tmp_path) == {"MatMul"}
    options = onnxruntime.SessionOptions()
    for key, value in SESSION_ENTRIES.items():
        options.add_session_config_entry(key, value)
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(model, options, providers=PROVIDERS).run(None, {"x": x})
    assert np.allclose(y, x.astype(np.float64) @ weight.T, rtol=1e-5, atol=1e-3)


def test_runner_refuses_what_is_no_graph(tmp_path: Path, config: LlamaConfig) -> None:
    (tmp_path / "traced.onnx").write_bytes(b"no graph")
    with pytest.raises(ValidationError, match=r"traced\.onnx: ONNX Runtime can't load it"):
        GraphRunner(tmp_path / "traced.onnx", config, "fp16")
