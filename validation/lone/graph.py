"""A lone ONNX file, opened and understood: its inputs and outputs, its precision, what its bytes are, and whether it is the checkpoint's at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from artifact.config import LlamaConfig
from artifact.errors import UsageError, ValidationError
from artifact.hashing import sha256_of
from artifact.io_spec import Dtype
from artifact.layout import MODULE_KEY, layer_of
from artifact.progress import Progress
from graphs.foreign.decoder import find_embedding
from graphs.foreign.ports import Ports, read_ports
from graphs.foreign.precision import Precision, read_precision
from graphs.foreign.source import external_tensors, open_graph


@dataclass(frozen=True)
class LoneGraph:
    """An ONNX file that is to be judged.

    Attributes:
        model: opened, its weights left in their files.
        one_position: whether it gives logits of the last position alone, [B, 1, V].
    """

    path: Path
    model: ir.Model
    ports: Ports
    precision: Precision

    @property
    def one_position(self) -> bool:
        """Whether a call gives the logits of its last position alone."""
        return self.ports.logits.shape[1] == 1

    @property
    def dtype(self) -> Dtype:
        """Of the artifact that such a graph would belong to: whether float16's noise measures it."""
        return "fp32" if self.precision.kind == "float32" else "fp16"

    @property
    def names_layers(self) -> bool:
        """Whether its nodes say which layer they belong to, as this toolkit's do."""
        return any(layer_of(node.metadata_props.get(MODULE_KEY)) is not None for node in self.model.graph)

    def describe(self, progress: Progress) -> dict[str, Any]:
        """The report's ``graph``: how it was understood, and which bytes were judged."""
        ports, model = self.ports, self.model
        read = (ports.input_ids, ports.attention_mask, ports.position_ids, *ports.past[:2])
        return {
            "file": self.path.name,
            "opset": model.opset_imports.get("", model.opset_imports.get("ai.onnx")),
            "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
            "precision": self.precision.kind,
            "precision_found": self.precision.found,
            "caches": f"{len(ports.past)} in, {len(ports.present)} out, told apart {ports.caches}" if ports.present else "none",
            "inputs": [str(port) for port in read if port is not None],
            "hashes": self._hashes(progress),
        }

    def _hashes(self, progress: Progress) -> dict[str, str]:
        """SHA-256 of the file and of every file that its weights lie in."""
        whole = self.path.resolve()
        files = list(dict.fromkeys([whole, *(whole.parent / tensor.location for tensor in external_tensors(self.model))]))
        hashes: dict[str, str] = {}
        for done, file in enumerate(files):
            progress(f"hashing {self.path.name} and its weights", done, len(files))
            hashes[self.path.name if file == whole else file.relative_to(whole.parent).as_posix()] = sha256_of(file)
        return hashes


def open_lone_graph(path: Path, config: LlamaConfig, source: str) -> LoneGraph:
    """Open a decoder's graph, and check that it can be the checkpoint's.

    Args:
        path: the ONNX file.
        config: the checkpoint's.
        source: what the user calls it.

    Raises:
        FusionError: the file can't be read, or is no decoder.
        ValidationError: an axis that must be dynamic is fixed.
        UsageError: its sizes are not the checkpoint's.
    """
    model = open_graph(path)
    common_passes.InlinePass()(model)  # what is run node by node has no functions,
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)  # and a constant is no result
    ports = read_ports(model)
    _check_axes(path, ports)
    different = [f"{name} is {expected}, the graph's {got}" for name, expected, got in _sizes(model, ports, config) if got not in (None, expected)]
    if different:
        raise UsageError(f"{path} is no graph of {source}: {'; '.join(different)}", hint="--checkpoint SRC names the model that it was exported from")
    return LoneGraph(path, model, ports, read_precision(model, ports))


def _sizes(model: ir.Model, ports: Ports, config: LlamaConfig) -> list[tuple[str, int, int | None]]:
    """(name, the checkpoint's, the graph's) of every size that both tell; None where the graph doesn't."""
    cache = next(iter(ports.past or ports.present), None)
    vocab_size, hidden_size = find_embedding(model) or (None, None)
    return [
        ("num_hidden_layers", config.num_hidden_layers, len(ports.present) // 2 or None),
        ("num_key_value_heads", config.num_key_value_heads, cache.shape[1] if cache else None),
        ("head_dim", config.head_dim, cache.shape[3] if cache else None),
        ("hidden_size", config.hidden_size, hidden_size),
        ("vocab_size", config.vocab_size, ports.logits.shape[2] or vocab_size),
    ]


def _check_axes(path: Path, ports: Ports) -> None:
    """The axes that calls of different lengths need; a batch of one is a limit (``limits``), another fixed batch is refused."""
    fixed = [("sequence length", ports.input_ids, 1), *(("past length", port, 2) for port in ports.past[:2])]
    fixed += [("total length", ports.attention_mask, 1)] if ports.attention_mask else []
    for what, port, axis in fixed:
        if port.shape[axis] is not None:
            hint = "export it with dynamic axes"
            raise ValidationError(f"{path}: the {what} of {port} is fixed; calls of different lengths can't be run", hint=hint)
    if ports.input_ids.shape[0] not in (None, 1):
        raise ValidationError(f"{path}: the batch of {ports.input_ids} is fixed; one sequence alone can't be run", hint="export it with dynamic axes")
