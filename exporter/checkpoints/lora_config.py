"""A PEFT adapter's adapter_config.json: keys are used, harmless or refused, as for config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from artifact.errors import CheckpointError
from artifact.numbers import positive_integer
from exporter.checkpoints.json_file import read_object
from exporter.checkpoints.shards import inside

CONFIG = "adapter_config.json"
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
"""Keys that make another adapter than W + scaling·B·A, with the values that don't. PiSSA, OLoRA, CorDA and LoftQ change the base model too."""
HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode "
    "layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_config megatron_core modules_to_save "
    "peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_rslora".split()
)
"""Keys that are used, or that say nothing about the merged weights."""


@dataclass(frozen=True)
class LoraConfig:
    """What decides how much of B·A is added to which weight; names as in PEFT."""

    r: int
    lora_alpha: float
    use_rslora: bool
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    picks_layers: bool
    unknown: tuple[str, ...]

    def rank(self, module: str) -> int:
        """The rank that a module's A and B must have."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """The factor of B·A: α/r, or α/√r with ``use_rslora``."""
        alpha, rank = float(_by_pattern(self.alpha_pattern, module, self.lora_alpha)), self.rank(module)
        return alpha / sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether the adapter says that it changes a module, `model.layers.0.self_attn.q_proj`: by a list of last names, or one expression."""
        if isinstance(self.target_modules, str):
            return self.target_modules == "all-linear" or re.fullmatch(self.target_modules, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.target_modules)


def read_lora_config(folder: Path) -> LoraConfig:
    """The folder's adapter_config.json.

    Raises:
        CheckpointError: none there, not what PEFT writes, or a kind of adapter that is not supported; the key is named.
    """
    raw = read_object(inside(folder, CONFIG), hint="--lora FOLDER takes what PEFT's save_pretrained writes")
    for key, allowed in REFUSED.items():
        if raw.get(key, allowed[0]) not in allowed:
            hint = "merge the adapter with PEFT (merge_and_unload) and export the merged model"
            raise CheckpointError(f"{CONFIG}: {key} = {raw[key]!r} is not supported; supported: {', '.join(map(repr, allowed))}", hint=hint)
    return _parsed(raw)


def _parsed(raw: Mapping[str, Any]) -> LoraConfig:
    modules = raw.get("target_modules")
    if not isinstance(modules, str | list) or not modules:
        raise CheckpointError(f"{CONFIG}: target_modules must be names or an expression, got {modules!r}")
    try:
        config = LoraConfig(
            r=positive_integer(f"{CONFIG}: r", raw.get("r")),
            lora_alpha=_finite("lora_alpha", raw["lora_alpha"]),
            use_rslora=bool(raw.get("use_rslora", False)),
            fan_in_fan_out=bool(raw.get("fan_in_fan_out", False)),
            rank_pattern={key: positive_integer(f"{CONFIG}: rank_pattern[{key!r}]", value) for key, value in (raw.get("rank_pattern") or {}).items()},
            alpha_pattern={key: _finite(f"alpha_pattern[{key!r}]", value) for key, value in (raw.get("alpha_pattern") or {}).items()},
            target_modules=modules if isinstance(modules, str) else tuple(modules),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            picks_layers=any(raw.get(key) not in (None, [], "") for key in ("layers_to_transform", "layers_pattern", "exclude_modules")),
            unknown=tuple(sorted(set(raw) - HARMLESS - REFUSED.keys())),
        )
        for expression in (*config.rank_pattern, *config.alpha_pattern, *([modules] if isinstance(modules, str) else [])):
            re.compile(expression)
    except KeyError as error:
        raise CheckpointError(f"{CONFIG}: {error} is missing") from error
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{CONFIG}: not what PEFT writes: {error}") from error
    return config


def _finite(name: str, value: object) -> float:
    """A number that weights can be multiplied with."""
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is None or not isfinite(number):
        raise CheckpointError(f"{CONFIG}: {name} must be a finite number, got {value!r}")
    return number


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that the end of a module's path matches, as PEFT looks it up."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)
