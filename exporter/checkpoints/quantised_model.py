"""A Hugging Face folder whose linears hold integers and scales: the weights are level × scale, and the scales can be had as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.given import Given
from artifact.layout import LM_HEAD, layer_prefix, linear_shapes
from exporter.checkpoints.file_tensor import TORCH_DTYPES, FileTensor, TensorFile
from exporter.checkpoints.huggingface import HuggingFaceCheckpoint, facts_of, read_config
from exporter.checkpoints.json_file import CONFIG
from exporter.checkpoints.pre_quant_scale import Folded, fold
from exporter.checkpoints.protocol import Place, Write
from exporter.checkpoints.quantised import read_quantised_config
from exporter.checkpoints.quantised_config import HINT, QuantisedConfig
from exporter.checkpoints.quantised_linear import ORDER, PACKED, PRE_SCALE, SHAPE, ZERO_POINTS, QuantisedLinear, find_linear
from exporter.checkpoints.shards import form_of, open_shards

SAFETENSORS = "safetensors"
TENSORS = (PACKED, SHAPE, PRE_SCALE, ORDER, *ZERO_POINTS, "weight_scale", "input_scale")
"""What a quantised linear has beside its weight and bias."""
NAMED = 4


@dataclass(kw_only=True)
class QuantisedCheckpoint(HuggingFaceCheckpoint):
    """A checked folder; attributes as in ``Checkpoint``.

    Attributes:
        given: its quantisation.
        linears: module → where its levels lie.
        folded: what pre_quant_scale makes weights be multiplied by.
    """

    given: Given
    linears: Mapping[str, QuantisedLinear] = field(repr=False)
    folded: Folded = field(repr=False)

    def read(self, name: str) -> Tensor:
        """One weight: level × scale in float32, or as stored; KeyError for a name the model does not have."""
        return self.read_rows(name, 0, self.shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one weight; KeyError for a name the model does not have."""
        module = name.rpartition(".")[0]
        rows = self.linears[module].rows(start, stop) if module in self.linears and name.endswith(".weight") else super().read_rows(name, start, stop)
        if name.endswith(".weight") and module in self.folded.columns:
            rows = rows.float() * self.folded.columns[module]
        if module in self.folded.rows:
            rows = rows.float() * self.folded.rows[module][start:stop].view(-1, *[1] * (rows.dim() - 1))
        return rows

    def scales(self, module: str, start: int, stop: int) -> Tensor:
        """Scales of some rows of a linear as its weight has them, pre_quant_scale of what reads them included; float32 [rows, groups]."""
        scales = self.linears[module].scales(start, stop)
        factor = self.folded.rows.get(module)
        return scales if factor is None else scales * factor[start:stop, None]

    @property
    def usable(self) -> list[str]:
        """Linears whose weight is level × scale and nothing else, in the order of the model."""
        return [module for module in self.linears if module not in self.folded.columns]

    def place(self, name: str) -> Place | None:
        """Where one weight lies as it is; None where it is computed."""
        module = name.rpartition(".")[0]
        computed = module in self.folded.rows or (module in self.linears and name.endswith(".weight"))
        return None if computed else super().place(name)

    def write_sidecars(self, write: Write) -> list[str]:
        """As a folder's, but config.json says nothing of a quantisation: an artifact's weights are floats."""
        names = [name for name in super().write_sidecars(write) if name != CONFIG]
        with write(CONFIG) as target:
            target.write_text(json.dumps(read_config(self.folder), indent=2) + "\n", encoding="utf-8")
        return [CONFIG, *names]


def open_quantised(folder: Path) -> QuantisedCheckpoint:
    """Open a quantised folder and check all of it but levels and scales.

    Raises:
        CheckpointError: as ``open_huggingface``; a quantisation that is not read; a linear that is not what the configuration says.
    """
    folder = folder.resolve()
    raw = read_config(folder)
    quantised = read_quantised_config(folder)
    assert quantised is not None
    config = LlamaConfig.from_hf(raw)
    if form_of(folder).name != SAFETENSORS:
        raise CheckpointError(f"{folder}: a quantised checkpoint is read from safetensors alone", hint=HINT)
    files = open_shards(folder)
    linears = _find_linears(config, quantised, files)
    folded = fold(config, {module: one.stored[PRE_SCALE].read().float() for module, one in linears.items() if PRE_SCALE in one.stored})
    floats = {name: file for name, file in files.items() if not _belongs(name, linears)}
    _check_floats(floats)
    computed = {f"{module}.weight": one.shape for module, one in linears.items()}
    facts = facts_of(folder, raw, files, {name: file.tensors[name].shape for name, file in floats.items()} | computed)
    given = replace(quantised.given, quantized=len(linears))
    checkpoint = QuantisedCheckpoint(**facts | {"format": f"{given.method} {given.format}"}, given=given, linears=linears, folded=folded)
    checkpoint.dtypes = dict(checkpoint.dtypes) | {f"{module}.weight": one.dtype for module, one in linears.items()}
    checkpoint.notes.extend(_notes(checkpoint, _modules(config)))
    return checkpoint


def _modules(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Every linear of the model: path → (out, in)."""
    shapes = linear_shapes(config)
    found = {f"{layer_prefix(layer)}.{name}": shape for layer in range(config.num_hidden_layers) for name, shape in shapes.items()}
    return found if config.tie_word_embeddings else found | {LM_HEAD.removesuffix(".weight"): (config.vocab_size, config.hidden_size)}


def _find_linears(config: LlamaConfig, quantised: QuantisedConfig, files: Mapping[str, TensorFile]) -> dict[str, QuantisedLinear]:
    found: dict[str, QuantisedLinear] = {}
    for module, shape in _modules(config).items():
        names = [name for name in ("weight", *TENSORS) if f"{module}.{name}" in files]
        stored: dict[str, FileTensor] = {name: files[f"{module}.{name}"].tensors[f"{module}.{name}"] for name in names}
        if quantised.covers(module):
            found[module] = find_linear(module, shape, quantised, stored)
        elif extra := [name for name in names if name != "weight"]:
            raise CheckpointError(f"the configuration says that {module} stays float, and the checkpoint has {module}.{extra[0]}", hint=HINT)
    if not found:
        raise CheckpointError("the configuration says that the checkpoint is quantised, and excludes every linear", hint=HINT)
    return found


def _belongs(name: str, linears: Mapping[str, QuantisedLinear]) -> bool:
    """Whether a tensor holds a linear's integers, or what goes with them."""
    module, _, kind = name.rpartition(".")
    return module in linears and kind in ("weight", *TENSORS)


def _check_floats(floats: Mapping[str, TensorFile]) -> None:
    for name, file in floats.items():
        if (dtype := file.tensors[name].dtype) not in TORCH_DTYPES:
            raise CheckpointError(
                f"the configuration says nothing of {name}, which is stored as {dtype}; supported: {', '.join(TORCH_DTYPES)}", hint=HINT
            )


def _notes(checkpoint: QuantisedCheckpoint, modules: Mapping[str, object]) -> list[str]:
    given, kept = checkpoint.given, [module for module in modules if module not in checkpoint.linears]
    notes = [f"quantised: {given.words}"]
    if given.scheme is None:
        notes.append(
            f"no form of `quantize` holds int{given.bits} weights with a scale for {given.group_size}: the float graphs alone are this model"
        )
    if given.activations == "dynamic":
        notes.append("a scale a token is measured while a model runs; `quantize` calibrates one static scale a linear instead")
    if kept:
        notes.append(f"float in the checkpoint: {_listed(kept)}")
    if checkpoint.folded.columns:
        reason = "pre_quant_scale differs where one factor is needed: the weight takes it, and stays float"
        notes.append(f"{reason}: {_listed(list(checkpoint.folded.columns))}")
    return notes


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
