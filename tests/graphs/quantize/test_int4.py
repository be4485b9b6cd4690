"""graphs/quantize/int4.py and weight_only.py: which blocks, which bytes, and one result in three tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file

from artifact.errors import QuantizationError
from artifact.layout import MODULE_KEY
from artifact.steps import StepContext
from artifact.tensor_file import plan_tensors, write_tensors
from graphs.quantize.int4 import BLOCKS, block_of, quantize_int4
from graphs.quantize.int8 import quantize_int8
from graphs.quantize.statistics import Statistics

NAME = "model.layers.0.self_attn.o_proj"
OUT, IN = 24, 192
GRAPH = f"""<ir_version: 11, opset_import: ["" : {{opset}}]>
g ({{dtype}}[B,{IN}] x) => ({{dtype}}[B,{OUT}] y)
<{{dtype}}[{OUT},{IN}] weight>
{{{{
    t = Transpose<perm=[1,0]>(weight)
    y = MatMul(x, t)
}}}}"""
DTYPES = {"float16": ("F16", ir.DataType.FLOAT16, np.float16), "float": ("F32", ir.DataType.FLOAT, np.float32)}


def make(folder: Path, dtype: str = "float16", opset: int = 23, weight: np.ndarray | None = None) -> StepContext:
    """A folder with a fused.onnx of one linear over external weights."""
    stored_as, ir_dtype, np_dtype = DTYPES[dtype]
    values = np.random.default_rng(0).standard_normal((OUT, IN)) if weight is None else weight
    values = np.ascontiguousarray(0.05 * values, np_dtype)
    header, planned = plan_tensors("weights/x.safetensors", {f"{NAME}.weight": (stored_as, values.shape)})
    (folder / "weights").mkdir(parents=True)
    (stored,) = write_tensors(folder / "weights" / "x.safetensors", header, planned, [memoryview(values).cast("B")])
    model = ir.from_onnx_text(GRAPH.format(opset=opset, dtype=dtype))
    value = model.graph[0].inputs[0]
    value.name = stored.name
    shape = ir.Shape(stored.shape)
    value.const_value = ir.ExternalTensor(stored.file, stored.offset, stored.length, ir_dtype, shape=shape, name=stored.name, base_dir=folder)
    model.graph.initializers.add(value)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = NAME
    ir.save(model, folder / "fused.onnx")
    return StepContext(folder)


def statistics(folder: Path, width: int = IN, site: str = NAME) -> Statistics:
    """Correlated inputs of the linear."""
    rng = np.random.default_rng(1)
    samples = (rng.standard_normal((300, 40)) @ rng.standard_normal((40, width))).astype(np.float16)
    exact = samples.astype(np.float32)
    fields = {"absmax": np.abs(exact).max(axis=0), "mean_square": np.square(exact).mean(axis=0), "samples": samples, "first": samples[:1]}
    save_file({f"{site}.{name}": value for name, value in fields.items()}, folder / "calibration.safetensors")
    return Statistics(folder / "calibration.safetensors")


def dequantized(folder: Path, scheme: str) -> np.ndarray:
    """[out, in] as the stored bytes say."""
    tensors = load_file(folder / "weights" / f"{scheme}-layer-000.safetensors")
    scale = tensors[f"{NAME}.weight_scale"].astype(np.float32)
    if scheme == "int8":
        return (tensors[f"{NAME}.weight_int8_t"] * scale).T
    levels = tensors[f"{NAME}.weight_int4"]
    signed = np.stack([levels & 15, levels >> 4], axis=-1).reshape(OUT, IN).astype(np.int8)
    return np.where(signed > 7, signed - 16, signed) * np.repeat(scale, IN // scale.shape[1], axis=1)


@pytest.mark.parametrize(("columns", "block"), [(4096, 128), (11008, 128), (576, 64), (1536, 128), (96, 32)])
def test_block_is_the_widest_that_divides_a_row(columns: int, block: int) -> None:
    assert block_of("w", columns) == block


def test_refuses_a_row_that_no_block_divides() -> None:
    with pytest.raises(QuantizationError, match=r"mlp\.down_proj: rows of 1000 weights can't be cut into blocks of 128, 64, 32") as caught:
        block_of("mlp.down_proj", 1000)
    assert "int8" in (caught.value.hint or "")


def test_levels_lie_two_in_a_byte_under_a_scale_for_each_block(tmp_path: Path) -> None:
    report = quantize_int4(make(tmp_path))
    assert (report["scheme"], report["method"], report["linears"], report["quantized"], report["blocks"]) == ("int4", "plain", 1, 1, {"64": 1})
    assert report["bytes"] == OUT * IN // 2 + 2 * OUT * IN // 64
    assert report["bytes_per_weight"] == round(0.5 + 2 / 64, 4)
    model = ir.load(tmp_path / "int4.onnx")
    (dequantize,) = (node for node in model.graph if node.op_type == "DequantizeLinear")
    assert {name: attribute.value for name, attribute in dequantize.attributes.items()} == {"axis": 1, "block_size": 64}
    assert [value.dtype for value in dequantize.inputs if value is not None] == [ir.DataType.INT4, ir.DataType.FLOAT16]
    assert [tuple(value.shape) for value in dequantize.inputs if value is not None] == [(OUT, IN), (OUT, IN // 64)]
    assert dequantize.metadata_props[MODULE_KEY] == NAME
    original = load_file(tmp_path / "weights" / "x.safetensors")[f"{NAME}.weight"].astype(np.float32)
    blocks = np.abs(original).reshape(OUT, -1, 64).max(axis=2, keepdims=True)
    assert (np.abs(dequantized(tmp_path, "int4") - original).reshape(OUT, -1, 64) <= 0.51 * blocks / 7).all()


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scheme", "quantize"), [("int8", quantize_int8), ("int4", quantize_int4)])
def test_torch_the_reference_evaluator_and_onnx_runtime_agree(tmp_path: Path, scheme: str, quantize: Any, dtype: str, calibrated: bool) -> None:
    step = make(tmp_path, dtype)
    report = quantize(step, statistics(tmp_path) if calibrated else None)
    assert report["method"] == ("gptq" if calibrated else "plain")
    path = tmp_path / f"{scheme}.onnx"
    x = np.random.default_rng(2).standard_normal((5, IN)).astype(DTYPES[dtype][2])
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.enable_dq_matmulnbits_fusion", "0")
    (runtime,) = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    (reference,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    weight = torch.from_numpy(dequantized(tmp_path, scheme).astype(np.float32)).to(torch.float16 if dtype == "float16" else torch.float32)
    fake = (torch.from_numpy(x).double() @ weight.double().T).numpy()
    limit = (2e-3 if dtype == "float16" else 1e-6) * np.abs(fake).max()
    assert np.abs(runtime - fake).max() <= limit
    assert np.abs(reference - fake).max() <= limit
    original = x.astype(np.float64) @ load_file(tmp_path / "weights" / "x.safetensors")[f"{NAME}.weight"].astype(np.float64).T
    assert np.abs(fake - original).max() > limit  # it is quantised


def test_calibrated_levels_lower_the_error_of_outputs(tmp_path: Path) -> None:
    report = quantize_int4(make(tmp_path), statistics(tmp_path))
    assert report["output_error"]["chosen"]["mean_rms"] < 0.6 * report["output_error"]["plain"]["mean_rms"]
    assert report["reach"] == 1


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_refuses_statistics_of_another_model(tmp_path: Path, quantize: Any) -> None:
    with pytest.raises(QuantizationError, match="they are of another model"):
        quantize(make(tmp_path), statistics(tmp_path, width=64))
    with pytest.raises(QuantizationError, match="it was made for another model"):
        quantize(StepContext(tmp_path), statistics(tmp_path, site="model.layers.9.self_attn.o_proj"))
    assert not list(tmp_path.glob("int*.onnx"))


def test_refuses_what_is_quantised_already_not_finite_or_too_old(tmp_path: Path) -> None:
    step = make(tmp_path / "a")
    quantize_int4(step)
    (step.artifact / "int4.onnx").replace(step.artifact / "fused.onnx")
    with pytest.raises(QuantizationError, match=r"fused\.onnx is quantised already"):
        quantize_int4(step)
    bad = np.zeros((OUT, IN))
    bad[7, 3] = np.nan
    with pytest.raises(QuantizationError, match=r"o_proj\.weight holds NaN or Inf"):
        quantize_int4(make(tmp_path / "b", weight=bad))
    with pytest.raises(QuantizationError, match=r"int4 needs opset 21, fused\.onnx is of opset 19") as caught:
        quantize_int4(make(tmp_path / "c", opset=19))
    assert "fuse" in (caught.value.hint or "")


def test_blocks_are_widest_first() -> None:
    assert sorted(BLOCKS, reverse=True) == list(BLOCKS)
