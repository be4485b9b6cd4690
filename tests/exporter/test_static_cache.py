"""The static cache: the same numbers as the dynamic one, in PyTorch and in ONNX Runtime, and the mask of ONNX's own Attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.steps import StepContext
from exporter.checkpoints import open_checkpoint
from exporter.export import export_checkpoint
from exporter.model import Cache, LlamaModel
from exporter.rope import rotary_tables
from exporter.static_cache import StaticLlamaModel, slots_allowed, tensor_scatter

CAPACITY = 32
FLOAT32_ROUNDING = 1e-5
"""Relative to the largest value: two orders of summation in float32."""
LENGTHS = [9, 4]
"""Tokens of each row of the ragged batch."""
Step = Callable[[Tensor, Tensor, Tensor, Tensor, list[Cache]], tuple[Tensor, list[Cache]]]
"""input_ids, position_ids, cache_write_indices, key_value_lengths, past → logits, present."""


@pytest.fixture(scope="module")
def checkpoint_folder(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module")
def state(checkpoint_folder: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    checkpoint = open_checkpoint(str(checkpoint_folder))
    cos, sin = rotary_tables(checkpoint.config, torch.float32)
    tensors = {name: checkpoint.read(name).float() for name in checkpoint.shapes}
    return checkpoint.config, tensors | {"model.rotary_emb.cos": cos, "model.rotary_emb.sin": sin}


@pytest.fixture(scope="module")
def reference(state: tuple[LlamaConfig, dict[str, Tensor]]) -> Callable[[Tensor], Tensor]:
    """Logits [S, V] of one whole sequence [S], without a cache: the dynamic model."""
    config, tensors = state
    model = LlamaModel(config).eval()
    model.load_state_dict(tensors)

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        empty = torch.zeros(1, config.num_key_value_heads, 0, config.head_dim)
        past = [(empty, empty.clone()) for _ in range(config.num_hidden_layers)]
        result: Tensor = model(ids[None], torch.ones(1, len(ids), dtype=torch.int64), torch.arange(len(ids))[None], past)[0][0]
        return result

    return logits


@pytest.fixture(scope="module")
def static_onnx(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> onnxruntime.InferenceSession:
    """``traced.onnx`` of a float32 export with a static cache."""
    artifact = tmp_path_factory.mktemp("static") / "artifact"
    artifact.mkdir()
    export_checkpoint(StepContext(artifact), open_checkpoint(str(checkpoint_folder)), dtype="fp32", kv_cache="static")
    return onnxruntime.InferenceSession(artifact / "traced.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(params=["torch", "onnx"])
def step(request: pytest.FixtureRequest, state: tuple[LlamaConfig, dict[str, Tensor]]) -> Step:
    """One call of the static form: the PyTorch model, or its traced graph in ONNX Runtime."""
    if request.param == "onnx":
        return onnx_step(request.getfixturevalue("static_onnx"))
    model = StaticLlamaModel(state[0]).eval()
    model.load_state_dict(state[1])
    return torch.no_grad()(model)


def onnx_step(session: onnxruntime.InferenceSession) -> Step:
    def call(ids: Tensor, positions: Tensor, indices: Tensor, lengths: Tensor, past: list[Cache]) -> tuple[Tensor, list[Cache]]:
        names = [value.name for value in session.get_inputs()]
        tensors = [ids, positions, indices, lengths, *(tensor for pair in past for tensor in pair)]
        logits, *presents = map(torch.from_numpy, session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}))
        return logits, list(zip(presents[::2], presents[1::2], strict=True))

    return call


def caches(config: LlamaConfig, batch: int, garbage: float = 0.0) -> list[Cache]:
    shape = (batch, config.num_key_value_heads, CAPACITY, config.head_dim)
    return [(torch.full(shape, garbage), torch.full(shape, -garbage)) for _ in range(config.num_hidden_layers)]


def assert_close(ours_y: Tensor, theirs_y: Tensor) -> None:
    assert (ours_y - theirs_y).abs().max() <= FLOAT32_ROUNDING * theirs_y.abs().max()


@pytest.mark.trace
def test_prefill_chunks_and_decode_match_the_dynamic_reference(step: Step, reference, state) -> None:
    ids = torch.randint(0, 64, (2, 14), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([reference(row) for row in ids])
    past, start = caches(state[0], 2, garbage=7.0), 0  # what is not in use may hold anything finite
    for end in (6, 7, 8, 12, 13, 14):  # prefill, single steps, a chunk with a past
        positions = torch.arange(start, end).expand(2, -1).contiguous()
        logits, past = step(ids[:, start:end].contiguous(), positions, torch.full((2,), start), torch.full((2,), end), past)
        assert_close(logits, expected[:, start:end])
        assert past[0][0].shape[2] == CAPACITY
        start = end


@pytest.mark.trace
def test_ragged_right_padded_batch_matches_each_row_alone(step: Step, reference, state) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 64, (length + 5,), generator=generator) for length in LENGTHS]
    longest = max(LENGTHS)
    ids = torch.stack([torch.cat((row[:length], torch.full((longest - length,), 63))) for row, length in zip(rows, LENGTHS, strict=True)])
    positions = torch.arange(longest).expand(2, -1).contiguous()
    logits, past = step(ids, positions, torch.zeros(2, dtype=torch.int64), torch.full((2,), longest), caches(state[0], 2))
    for row, length, ours_y in zip(rows, LENGTHS, logits, strict=True):
        assert_close(ours_y[:length], reference(row[:length]))
    lengths = torch.tensor(LENGTHS)
    for done in range(5):  # each row writes behind its own last token, over what was padding
        new = torch.stack([row[length + done : length + done + 1] for row, length in zip(rows, LENGTHS, strict=True)])
        logits, past = step(new, (lengths + done)[:, None], lengths + done, lengths + done + 1, past)
        for row, length, ours_y in zip(rows, LENGTHS, logits, strict=True):
            assert_close(ours_y, reference(row[: length + done + 1])[-1:])


@pytest.mark.trace
def test_graph_holds_two_scatters_a_layer_and_plain_operations_otherwise(static_onnx, state) -> None:
    graph = ir.load(static_onnx._model_path)
    scatters = [node for node in graph.graph if node.op_type == "TensorScatter"]
    assert len(scatters) == 2 * state[0].num_hidden_layers
    assert {tuple((name, attribute.value) for name, attribute in sorted(node.attributes.items())) for node in scatters} == {
        (("axis", -2), ("mode", "linear"))
    }
    assert all(node.inputs[0] in graph.graph.inputs and node.outputs[0] in graph.graph.outputs for node in scatters)  # TensorRT: in place
    assert {node.inputs[2].name for node in scatters} == {io_spec.CACHE_WRITE_INDICES}
    assert not {"Attention", "RotaryEmbedding", "RMSNormalization", "ScatterElements", "ScatterND"} & {node.op_type for node in graph.graph}
    assert graph.opset_imports[""] == io_spec.OPSETS["static"] == 24


@pytest.mark.trace
def test_cache_is_written_in_place_where_past_and_present_are_one_buffer(static_onnx, state, reference) -> None:
    config, _ = state
    ids = torch.randint(0, 64, (6,), generator=torch.Generator().manual_seed(3))
    buffers = {}
    for layer in range(config.num_hidden_layers):
        for kind in io_spec.CACHE_KINDS:
            zeros = np.zeros((1, config.num_key_value_heads, CAPACITY, config.head_dim), np.float32)
            buffers[layer, kind] = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        binding = static_onnx.io_binding()
        new = ids[None, start:end].numpy()
        for name, value in zip(("input_ids", "position_ids"), (new, np.arange(start, end)[None]), strict=True):
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        binding.bind_cpu_input(io_spec.CACHE_WRITE_INDICES, np.array([start]))
        binding.bind_cpu_input(io_spec.KEY_VALUE_LENGTHS, np.array([end]))
        for (layer, kind), buffer in buffers.items():
            binding.bind_ortvalue_input(io_spec.past_name(layer, kind), buffer)
            binding.bind_ortvalue_output(io_spec.present_name(layer, kind), buffer)
        binding.bind_output(io_spec.LOGITS)
        static_onnx.run_with_iobinding(binding)
        logits = next(output for output in binding.get_outputs() if output.shape()[-1] == config.vocab_size).numpy()
        assert_close(torch.from_numpy(logits)[0], reference(ids[:end])[start:])


ATTENTION_24 = """
<ir_version: 11, opset_import: ["" : 24]>
attention (float[B,H,S,D] query, float[B,K,C,D] key_cache, float[B,K,C,D] value_cache, float[B,K,S,D] key, float[B,K,S,D] value,
           int64[B] write_indices, int64[B] lengths) => (float[B,H,S,D] context)
{
    keys = TensorScatter<axis = -2, mode = "linear">(key_cache, key, write_indices)
    values = TensorScatter<axis = -2, mode = "linear">(value_cache, value, write_indices)
    context = Attention<is_causal = 1, scale = 1.0>(query, keys, values, , , , lengths)
}
"""


@pytest.mark.parametrize(("indices", "n_new"), [([0, 0], 5), ([0, 0], 1), ([3, 3], 4), ([7, 2], 1), ([7, 2], 3), ([11, 0], 1), ([8, 1], 4)], ids=str)
@pytest.mark.parametrize("n_heads", [2, 4], ids=["multi-head", "grouped"])
def test_mask_is_that_of_attention_24_with_lengths(indices: list[int], n_new: int, n_heads: int) -> None:
    """What a fusion may make of the traced form: Attention, is_causal, nonpad_kv_seqlen = key_value_lengths."""
    generator = torch.Generator().manual_seed(0)
    batch, n_kv_heads, capacity, head_dim = 2, 2, 12, 8
    query = torch.randn(batch, n_heads, n_new, head_dim, generator=generator)
    key_cache, value_cache = torch.randn(2, batch, n_kv_heads, capacity, head_dim, generator=generator)
    key, value = torch.randn(2, batch, n_kv_heads, n_new, head_dim, generator=generator)
    write_indices = torch.tensor(indices)
    lengths = write_indices + n_new
    session = onnxruntime.InferenceSession(ir.to_proto(ir.from_onnx_text(ATTENTION_24)).SerializeToString(), providers=["CPUExecutionProvider"])
    tensors = (query, key_cache, value_cache, key, value, write_indices, lengths)
    feeds = {spec.name: tensor.numpy() for spec, tensor in zip(session.get_inputs(), tensors, strict=True)}
    theirs_y = torch.from_numpy(session.run(None, feeds)[0])
    keys, values = (
        tensor_scatter(cache, new, write_indices).repeat_interleave(n_heads // n_kv_heads, dim=1)
        for cache, new in ((key_cache, key), (value_cache, value))
    )
    scores = torch.where(slots_allowed(write_indices, lengths, n_new, capacity), query @ keys.transpose(-1, -2), torch.finfo(torch.float32).min)
    assert_close(torch.softmax(scores, -1) @ values, theirs_y)


def test_no_row_is_ever_fully_masked() -> None:
    allowed = slots_allowed(torch.tensor([2, 0]), torch.tensor([0, 4]), n_new=2, capacity=5)  # lengths that no caller should give
    assert allowed[:, 0].tolist() == [
        [[False, False, True, False, False], [False, False, False, True, False]],
        [[True, True, True, False, False], [True, True, True, True, False]],
    ]


def test_tensor_scatter_refuses_an_index_beyond_the_capacity() -> None:
    cache, new = torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 2, 2)
    assert tensor_scatter(cache, new, torch.tensor([2]))[0, 0, :, 0].tolist() == [0, 0, 1, 1]
    assert not cache.any()
    with pytest.raises(RuntimeError, match="out of bounds"):
        tensor_scatter(cache, new, torch.tensor([3]))
