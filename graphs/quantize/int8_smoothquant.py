"""INT8 with INT8 activations (W8A8): weights by output channel, inputs by one static scale, outliers moved from inputs into weights (SmoothQuant).

Before:  x ─ Cast(FLOAT) ─ MatMul(Cast(Transpose(weight))) ─ Cast(FLOAT16)
After:   an island of Q/DQ around each linear of the layers (islands.py). Norms, v_proj's and up_proj's rows are divided by what the linears behind
         them are multiplied by (smoothing.py says by what, scaling.py how). Linears that are kept from it are weight-only INT8 (int8.py).

Source: SmoothQuant, arXiv:2211.10438; docs/adr/015
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact.config import LlamaConfig
from artifact.errors import QuantizationError
from artifact.manifest import read_manifest
from artifact.steps import StepContext
from artifact.tensor_file import StoredTensor
from graphs.quantize.int8 import FORM
from graphs.quantize.islands import island_piece, put_islands
from graphs.quantize.linears import Linear, bias_of, site_of
from graphs.quantize.rounder import Rounder, rounding_report
from graphs.quantize.scaling import Scaling, fold
from graphs.quantize.smoothing import Smoothing, smooth
from graphs.quantize.statistics import Divided, Statistics
from graphs.quantize.weight_only import kept_always, open_fused
from graphs.quantize.writer import SAFETENSORS, Piece, add_initializer, elements, read_mapped, write_pieces

SCHEME = "int8-smoothquant"
NOTHING: Mapping[str, str] = MappingProxyType({})


def quantize_int8_smoothquant(
    step: StepContext, statistics: Statistics | None, *, kept: Mapping[str, str] = NOTHING, found: Mapping[str, Smoothing] | None = None
) -> dict[str, Any]:
    """Write ``int8-smoothquant.onnx`` and ``weights/int8-smoothquant-*.safetensors`` from ``fused.onnx``.

    Args:
        step: the artifact.
        statistics: what calibration measured of activations.
        kept: module path of a linear → why its input stays as it is: it becomes weight-only INT8.
        found: what ``smooth`` found, if that is known already.

    Returns:
        scheme, linears, quantized, kept, bytes, nodes, what ``rounding_report`` says, w8a8 {linears, share of the layers' linear weights},
        sites [{site, alpha, headroom, activation_scale, error, first_error, plain_error}].

    Raises:
        QuantizationError: there are no statistics, or another model's; the graph is quantised already, has no linears, or none of a name that is
            kept; a weight holds NaN or Inf.
    """
    if statistics is None:
        raise QuantizationError(f"{SCHEME} rounds activations by scales that are measured", hint="--scheme int8 is weight-only")
    model, linears, chosen = open_fused(step, SCHEME, FORM.opset)
    if unknown := kept.keys() - {linear.name for linear in chosen}:
        raise QuantizationError(f"fused.onnx has no linear {sorted(unknown)[0]} that could be kept from {SCHEME}")
    rounded = [linear for linear in chosen if linear.name not in kept]
    config = LlamaConfig(**read_manifest(step.artifact)["model"]["config"])
    sites = {site: list(group) for site, group in groupby(rounded, key=lambda linear: site_of(linear.name))}
    smoothing = found or smooth(config, statistics, sites, lambda site: _weights(sites[site], step.artifact), step.progress)
    scaling = fold(config, {site: smoothing[site].vector for site in sites}, lambda name: _read(model.graph, name, step.artifact))
    rounder = Rounder(Divided(statistics, {site: smoothing[site].vector for site in sites}))
    pieces = [_piece(step, linear, scaling, rounder, whole=linear.name not in kept) for linear in chosen]
    stored = write_pieces(step, SCHEME, [*_vectors(model.graph, scaling, chosen, step.artifact), *pieces])
    _rewrite(model.graph, chosen, kept, smoothing, stored)
    with step.write(f"{SCHEME}.onnx") as temporary:
        ir.save(model, temporary)
    return {
        "scheme": SCHEME,
        "linears": len(linears),
        "quantized": len(chosen),
        "kept": [*kept_always(linears, chosen), *({"name": name, "reason": reason} for name, reason in kept.items())],
        "bytes": sum(tensor.length for tensor in stored.values()),
        "nodes": model.graph.num_nodes(),
        **rounding_report(rounder),
        "w8a8": {"linears": len(rounded), "share": elements(rounded) / elements(chosen)},
        "sites": [{"site": site, **smoothing[site].as_report()} for site in sites],
    }


def _weights(linears: list[Linear], folder: Path) -> NDArray[Any]:
    """Weights [out, in] of one site, in the order of the graph."""
    return np.concatenate([read_mapped(linear.weight, folder, np.array) for linear in linears])


def _read(graph: ir.Graph, name: str, folder: Path) -> NDArray[Any]:
    """A weight that the graph reads by this name."""
    if name not in graph.initializers:
        raise QuantizationError(f"fused.onnx has no {name}, which smoothing has to change", hint="python cli.py fuse ART --force")
    return read_mapped(graph.initializers[name], folder, np.array)


def _piece(step: StepContext, linear: Linear, scaling: Scaling, rounder: Rounder, *, whole: bool) -> Piece:
    """Levels and scales of one linear as it is scaled."""

    def rounded(weight: NDArray[Any], dtype: np.dtype[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        return rounder.round(scaling.weight(linear.name, weight), linear.name, FORM.grid(linear.name, weight.shape[1], dtype))

    return island_piece(linear, step.artifact, rounded, whole=whole)


def _vectors(graph: ir.Graph, scaling: Scaling, chosen: list[Linear], folder: Path) -> Iterator[Piece]:
    """Norms and biases that are other ones now; a bias is what a linear's output is added to, whatever its name.

    Raises:
        QuantizationError: something else reads the bias too, which must stay as it is for that.
    """
    changed = dict(scaling.norms)
    for linear in chosen:
        found = bias_of(linear)
        if found is None or scaling.rows(linear.name) is None:
            continue
        name = str(found.name)
        if len(found.uses()) > 1:
            raise QuantizationError(f"{name}, which smoothing has to change, is not {linear.name}'s alone", hint="--scheme int8 smoothes nothing")
        bias = _read(graph, name, folder)
        changed[name] = scaling.bias(linear.name, bias).astype(bias.dtype)
    for name, array in changed.items():
        dtype = SAFETENSORS[ir.DataType.from_numpy(array.dtype)]
        yield Piece(name.rsplit(".", 1)[0], {_smoothed(name): (dtype, array.shape)}, lambda array=array: [array])  # type: ignore[misc]


def _smoothed(name: str) -> str:
    return f"{name}_smoothed"


def _rewrite(
    graph: ir.Graph, chosen: list[Linear], kept: Mapping[str, str], smoothing: Mapping[str, Smoothing], stored: Mapping[str, StoredTensor]
) -> None:
    """Islands, weight-only linears, and the smoothed vectors in the place of the old ones."""
    scales = {linear.name: smoothing[site_of(linear.name)].activation_scale for linear in chosen if linear.name not in kept}
    put_islands(graph, chosen, scales, stored)
    for name, old in [(name, value) for name, value in graph.initializers.items() if _smoothed(name) in stored]:
        new = add_initializer(graph, stored[_smoothed(name)], old.dtype or ir.DataType.FLOAT16)
        ir.convenience.replace_all_uses_with(old, new)
        del graph.initializers[name]
