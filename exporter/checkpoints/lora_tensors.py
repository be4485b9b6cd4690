"""The tensors of a PEFT adapter: which changes which weight, checked against the model that it is merged into."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from artifact.errors import CheckpointError
from artifact.layout import EMBEDDING, LM_HEAD
from exporter.checkpoints.census import by_model_name
from exporter.checkpoints.file_tensor import TORCH_DTYPES, FileTensor, TensorFile
from exporter.checkpoints.lora_config import LoraConfig
from exporter.checkpoints.safetensors_file import open_safetensors
from exporter.checkpoints.shards import inside
from exporter.checkpoints.torch_file import open_torch

FILES: Mapping[str, Callable[[Path], TensorFile]] = {"adapter_model.safetensors": open_safetensors, "adapter_model.bin": open_torch}
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.default)?(\.weight)?")
SAVED = re.compile(r"(?P<module>.+?)(\.modules_to_save)?(\.default)?(\.base_layer)?\.weight")
PREFIX = "base_model.model."
_MERGE = "merge the adapter with PEFT (merge_and_unload) and export the merged model"


@dataclass(frozen=True)
class Factors:
    """Both factors of what is added to a weight [out, in]: ``a`` [r, in], ``b`` [out, r]; an embedding's product is turned round."""

    a: FileTensor
    b: FileTensor
    scaling: float
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: weight name → what is added to it, weight name → what replaces it."""

    file: TensorFile
    added: Mapping[str, Factors]
    replaced: Mapping[str, FileTensor]


def open_adapter(folder: Path, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Open the adapter's file and find the weight of the model for each of its tensors.

    Raises:
        CheckpointError: no file, half a pair, a rank or shape that does not fit, a tensor that belongs to no weight, two for one
            place, or a target without tensors.
    """
    name = next((name for name in FILES if inside(folder, name).is_file()), None)
    if name is None:
        raise CheckpointError(f"{folder}: neither {' nor '.join(FILES)}", hint="--lora FOLDER takes what PEFT's save_pretrained writes")
    file = FILES[name](inside(folder, name))
    for key, tensor in file.tensors.items():
        if tensor.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{name}: tensor {key} has dtype {tensor.dtype}; supported: {', '.join(TORCH_DTYPES)}")
    factors: dict[str, dict[str, FileTensor]] = {}
    replaced: dict[str, FileTensor] = {}
    for (weight, factor), tensor in by_model_name(file.tensors, lambda key: _belongs(name, key, shapes)).items():
        if factor is None:
            replaced[weight] = _replacement(name, weight, tensor, shapes[weight])
        else:
            factors.setdefault(weight, {})[factor] = tensor
    added = {weight: _factors(name, weight, pair, shapes[weight], config) for weight, pair in factors.items()}
    _check_targets(name, config, shapes, added, replaced)
    return Adapter(file, added, replaced)


def _belongs(file: str, key: str, shapes: Mapping[str, object]) -> tuple[str, str | None]:
    """The weight that a tensor belongs to, and which factor it is: ``A``, ``B``, ``embedding_A`` …; None replaces the weight."""
    match = FACTOR.fullmatch(key) or SAVED.fullmatch(key)
    weight = f"{match['module'].removeprefix(PREFIX)}.weight" if match else key
    if match is None or weight not in shapes:
        tied = " (the model ties lm_head to its embedding)" if weight == LM_HEAD else ""
        raise CheckpointError(f"{file}: tensor {key} belongs to no weight of the model{tied}", hint="take the adapter of this base model")
    if weight == EMBEDDING and LM_HEAD not in shapes:
        raise CheckpointError(f"{file}: tensor {key} changes an embedding that is lm_head too; that is not supported", hint=_MERGE)
    return weight, f"{match['embedding'] or ''}{match['factor']}" if "factor" in match.re.groupindex else None


def _factors(file: str, weight: str, pair: Mapping[str, FileTensor], shape: tuple[int, ...], config: LoraConfig) -> Factors:
    module = weight.removesuffix(".weight")
    embedding = "embedding_A" in pair or "embedding_B" in pair
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if set(pair) != set(names) or len(shape) != 2 or embedding != (weight == EMBEDDING):
        raise CheckpointError(f"{file}: {module} has {', '.join(f'lora_{name}' for name in sorted(pair))}; expected lora_A and lora_B of a linear")
    rank, (out, width) = config.rank(module), shape[::-1] if embedding else shape
    for name, expected in zip(names, ((rank, width), (out, rank)), strict=True):
        if pair[name].shape != expected:
            raise CheckpointError(
                f"{file}: {module}.lora_{name} has shape {list(pair[name].shape)}; rank {rank} and a weight {list(shape)} need {list(expected)}",
                hint="take the adapter of this base model, with its own adapter_config.json",
            )
    return Factors(pair[names[0]], pair[names[1]], config.scaling(module), embedding)


def _replacement(file: str, key: str, tensor: FileTensor, shape: tuple[int, ...]) -> FileTensor:
    if tensor.shape != shape:
        raise CheckpointError(f"{file}: tensor {key} has shape {list(tensor.shape)}, the model's weight {list(shape)}", hint=_MERGE)
    return tensor


def _check_targets(
    file: str, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]], added: Mapping[str, Factors], replaced: Mapping[str, FileTensor]
) -> None:
    modules = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2}
    for name in added:
        if not config.targets(name.removesuffix(".weight")):
            raise CheckpointError(f"{file}: {name} is changed, but adapter_config.json's target_modules don't name it")
    if config.target_modules == "all-linear":  # PEFT's word for every linear but the one that gives the logits
        modules -= {EMBEDDING.removesuffix(".weight"), LM_HEAD.removesuffix(".weight")}
    there = added.keys() | replaced.keys()
    missing = [] if config.picks_layers else sorted(module for module in modules if config.targets(module) and f"{module}.weight" not in there)
    missing += [name for name in config.modules_to_save if not any(f".{weight}".endswith(f".{name}.weight") for weight in replaced)]
    if missing:
        raise CheckpointError(f"{file}: adapter_config.json names {missing[0]}, but no tensor of it is there", hint="copy the adapter again")
