"""What a quantised checkpoint's configuration says: which linears hold integers, of how many bits, with which scales.

compressed-tensors   config.json: quantization_config (older: compression_config) with quant_method, format, config_groups, ignore
ModelOpt             the same key with quant_algo and ignore, or hf_quant_config.json: quantization with quant_algo and exclude_modules

Integers with scales and no zero points are read; everything else is refused by its name.
Source: github.com/vllm-project/compressed-tensors (quantization/quant_config.py), github.com/NVIDIA/Model-Optimizer (torch/export).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from artifact.errors import CheckpointError
from artifact.given import Activations, Given

COMPRESSED, MODELOPT = "compressed-tensors", "modelopt"
READ = f"read are {COMPRESSED} (int-quantized, naive-quantized, pack-quantized) and {MODELOPT} (W8A16, W8A8_SQ_PER_CHANNEL, W4A16_AWQ), symmetric"
ORIGINAL = "give the float16 or bfloat16 original; `quantize` makes the int8 graph"
HINT = f"{READ}; or {ORIGINAL}"

Packing = Literal["plain", "words", "row pairs"]
"""Levels as int8; several in an int32 along a row; those of two rows in a byte."""
PACKINGS: Mapping[str, Packing] = {"int-quantized": "plain", "naive-quantized": "plain", "pack-quantized": "words"}
ALGORITHMS: Mapping[str, tuple[int, Activations, Packing]] = {
    "W8A16": (8, "float", "plain"),
    "W8A8_SQ_PER_CHANNEL": (8, "static", "plain"),
    "W4A16_AWQ": (4, "float", "row pairs"),
}
"""ModelOpt's word → bits, activations and packing."""
BITS = (4, 8)
LINEAR = "Linear"


@dataclass(frozen=True)
class QuantisedConfig:
    """A configuration that can be read.

    Attributes:
        given: what the quantisation is.
        packing: how levels are stored.
        targets, ignored: patterns of modules: a name, `re:` and an expression, a name with `*`, or `Linear` for every linear.
    """

    given: Given
    packing: Packing
    targets: tuple[str, ...]
    ignored: tuple[str, ...]

    def covers(self, module: str) -> bool:
        """Whether a linear is said to hold integers."""
        return _any_matches(self.targets, module) and not _any_matches(self.ignored, module)


def compressed_config(config: Mapping[str, Any]) -> QuantisedConfig:
    """Read what compressed-tensors writes.

    Raises:
        CheckpointError: a form that is not read; it is named.
    """
    for key in ("kv_cache_scheme", "transform_config"):
        if config.get(key):
            raise _refused(f"{key} is set, and the graphs compute nothing of the kind")
    for key in ("sparsity_config", "sparsity"):
        if (config.get(key) or {}).get("format", "dense") != "dense":
            raise _refused(f"{key} says that weights are left out")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise _refused("config_groups holds no groups")
    read = {_group(name, group, group.get("format") or config.get("format")) for name, group in groups.items()}
    if len(read) > 1:
        raise _refused(f"config_groups quantise linears in {len(read)} ways, and a graph has one scheme")
    given, packing = read.pop()
    return QuantisedConfig(
        given, packing, _patterns([target for group in groups.values() for target in group.get("targets") or ()]), _patterns(config.get("ignore"))
    )


def modelopt_config(config: Mapping[str, Any]) -> QuantisedConfig:
    """Read what ModelOpt writes, in either file.

    Raises:
        CheckpointError: a form that is not read; it is named.
    """
    inner = config.get("quantization")
    facts = inner if isinstance(inner, dict) else config
    algorithm = str(facts.get("quant_algo"))
    if algorithm not in ALGORITHMS:
        raise _refused(f"quant_algo is {algorithm!r}", method=MODELOPT)
    if facts.get("kv_cache_quant_algo") or facts.get("kv_cache_scheme"):
        raise _refused("the cache is to be quantised, and the graphs compute nothing of the kind", method=MODELOPT)
    bits, activations, packing = ALGORITHMS[algorithm]
    group = _group_size("group_size", facts.get("group_size", 0) or _group_of(facts), MODELOPT) if bits == min(BITS) else 0
    if bits == min(BITS) and not group:
        raise _refused("group_size is missing", method=MODELOPT)
    ignored = facts.get("exclude_modules") if "exclude_modules" in facts else facts.get("ignore")
    return QuantisedConfig(Given(MODELOPT, algorithm, bits, group, activations), packing, (LINEAR,), _patterns(ignored, MODELOPT))


def _group(name: str, group: Mapping[str, Any], form: Any) -> tuple[Given, Packing]:
    """One of config_groups."""
    where, weights = f"config_groups.{name}", group.get("weights")
    if form not in PACKINGS:
        raise _refused(f"format is {form!r}")
    if not isinstance(weights, dict):
        raise _refused(f"{where}.weights is missing")
    if group.get("output_activations"):
        raise _refused(f"{where} quantises what linears give, and the graphs compute nothing of the kind")
    _check_integers(f"{where}.weights", weights)
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if bits not in BITS:
        raise _refused(f"{where}.weights has {bits} bits")
    if weights.get("dynamic") or strategy not in ("tensor", "channel", "group"):
        raise _refused(f"{where}.weights has strategy {strategy!r}" + (", dynamic" if weights.get("dynamic") else ""))
    if weights.get("actorder") not in (None, False, "weight", "static"):  # those two order the columns while rounding alone
        raise _refused(f"{where}.weights has actorder {weights['actorder']!r}: columns in another order")
    activations = _activations(f"{where}.input_activations", group.get("input_activations"))
    if activations != "float" and bits != max(BITS):
        raise _refused(f"{where} has {bits}-bit weights with int8 activations")
    size = _group_size(f"{where}.weights.group_size", weights.get("group_size")) if strategy == "group" else 0
    if activations != "float" and size:
        raise _refused(f"{where} has int8 activations and a scale for {size} weights: a product of integers has one scale a row")
    return Given(COMPRESSED, str(form), bits, size, activations), PACKINGS[form]


def _activations(where: str, facts: Any) -> Activations:
    if not facts:
        return "float"
    if not isinstance(facts, dict):
        raise _refused(f"{where} is no object")
    _check_integers(where, facts)
    if facts.get("num_bits") != max(BITS):
        raise _refused(f"{where} has {facts.get('num_bits')} bits")
    dynamic, strategy = facts.get("dynamic"), facts.get("strategy")
    if dynamic is True and strategy in ("token", "tensor"):
        return "dynamic"
    if not dynamic and strategy in ("tensor", None):
        return "static"
    raise _refused(f"{where} has strategy {strategy!r}, dynamic {dynamic!r}")


def _check_integers(where: str, facts: Mapping[str, Any]) -> None:
    if facts.get("type", "int") != "int":
        raise _refused(f"{where} has type {facts['type']!r}")
    if facts.get("symmetric", True) is not True:
        raise _refused(f"{where} is asymmetric")


def _group_of(facts: Mapping[str, Any]) -> Any:
    """ModelOpt's config.json states the size in config_groups."""
    groups = facts.get("config_groups")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    return next((one["group_size"] for one in weights if isinstance(one, dict) and one.get("group_size")), 0)


def _group_size(where: str, value: Any, method: str = COMPRESSED) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _refused(f"{where} is {value!r}", method=method)
    return value


def _patterns(value: Any, method: str = COMPRESSED) -> tuple[str, ...]:
    """Patterns of modules, each one tried.

    Raises:
        CheckpointError: not a list of texts, or an expression that is none.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _refused(f"{value!r} is no list of modules", method=method)
    for one in value:
        try:
            re.compile(one.removeprefix("re:") if one.startswith("re:") else "")
        except re.error as error:
            raise _refused(f"{one!r} is no regular expression: {error}", method=method) from error
    return tuple(value)


def _any_matches(patterns: tuple[str, ...], module: str) -> bool:
    return any(one == LINEAR or (re.match(one[3:], module) is not None if one.startswith("re:") else fnmatchcase(module, one)) for one in patterns)


def _refused(reason: str, *, method: str = COMPRESSED) -> CheckpointError:
    return CheckpointError(f"the checkpoint is quantised ({method!r}) in a way that is not read: {reason}", hint=HINT)
