"""engines/inspected_plan.py, on accounts of layers in the form that TensorRT's inspector gives."""

from __future__ import annotations

from typing import Any

from engines.inspected_plan import LIBRARY_GEMM, read_layers


def layer(name: str, kind: str = "kgen", labels: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Metadata": "\x1f".join(f"[ONNX Layer: {label}]" for label in labels), **more}


def test_names_kinds_and_nodes_are_read() -> None:
    tensor = {"Name": "x", "Dimensions": [4, -1, 576], "Format/Datatype": "Half"}
    weight = {"Name": "__mye3423_dconst", "Dimensions": [576, 960], "Format/Datatype": "Int8"}
    layers = [
        layer("_gemm_mha_v2_myl0_5", labels=("node_l0_attention", "node_l0_out"), Inputs=[tensor], Outputs=[tensor]),
        layer("node_l0_qkv_myl0_3", "gemm", ("node_l0_qkv",), Inputs=[tensor, weight], Outputs=[tensor]),
        layer("weights", "Constant"),
        layer("_gemv_mha_v1_myl1_5 [profile 1]", labels=("node_l0_attention",), Outputs=[{"Name": "present.0.key [profile 1].1", "Dimensions": [1]}]),
    ]
    prefill, decode = read_layers({"Layers": layers, "Bindings": []}, 2)
    assert [kernel.name for kernel in prefill.kernels] == ["_gemm_mha_v2", LIBRARY_GEMM]
    assert prefill.kernels[0].layers == ("node_l0_attention", "node_l0_out")
    (constant,) = prefill.kernels[1].constants
    assert (constant.dtype, constant.size_bytes) == ("int8", 576 * 960)
    assert prefill.kernels[1].reads[0].dims == (4, "x.1", 576)
    assert [kernel.name for kernel in decode.kernels] == ["_gemv_mha_v1"]
    assert decode.kernels[0].writes[0].interface == "present.0.key"


def test_names_alone_and_nothing_at_all_are_read_too() -> None:
    assert [kernel.name for kernel in read_layers({"Layers": ["__myl_Fc_myl0_3"]}, 1)[0].kernels] == ["__myl_Fc"]
    assert [program.kernels for program in read_layers("no JSON", 2)] == [(), ()]
