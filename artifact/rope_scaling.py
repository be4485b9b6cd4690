"""How a model scales its rotary frequencies, in Hugging Face's words: the kinds, what each is made of, and what is refused by name.

Kinds are resolved when they are read: what a config leaves out stands here as the number that it means, so that nothing downstream has defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from artifact.errors import CheckpointError
from artifact.numbers import positive_integer, positive_number

DEFAULT_THETA, DEFAULT_LENGTH = 10000.0, 2048
"""What transformers takes where config.json has no rope_theta, or no max_position_embeddings."""
SPELLINGS = ("rope_scaling", "rope_parameters")
"""The key of config.json: the first until transformers 4, the second from 5 on, with rope_theta inside."""
REFUSED: Mapping[str, tuple[Any, ...]] = {"partial_rotary_factor": (1.0, None), "mrope_section": (None,)}
"""Keys inside that change the model, with the values that leave it as it is."""
_LENGTH = "original_max_position_embeddings"
HARMLESS = frozenset({"rope_type", "type", "rope_theta", "finetuned"}) | REFUSED.keys()


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """One way to scale; fields that a kind does not use are None. Names as in Hugging Face's ``rope_parameters``.

    Attributes:
        rope_type: ``linear``, ``dynamic``, ``llama3``, ``yarn``, or ``longrope`` with one list of factors for every length.
        attention_factor: on cosine and sine.
        frequency_factors: D/2 divisors of the frequencies; the ``short_factor`` and ``long_factor`` of a longrope that has them equal.
    """

    rope_type: str
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    frequency_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "frequency_factors", tuple_of(self.frequency_factors))
        if self.low_freq_factor is not None and self.high_freq_factor is not None and self.low_freq_factor >= self.high_freq_factor:
            raise CheckpointError(f"config: high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}")

    def to_hf(self) -> dict[str, Any]:
        """A ``rope_scaling`` that Hugging Face transformers reads as the same scaling."""
        fields = {name: value for name, value in vars(self).items() if value is not None}
        factors = fields.pop("frequency_factors", None)
        return fields if factors is None else fields | {"factor": 1.0, "short_factor": list(factors), "long_factor": list(factors)}


def tuple_of(value: Any) -> Any:
    """A list as a tuple: JSON knows no tuples, and a config that comes from a manifest must equal the one that went in."""
    return tuple(value) if isinstance(value, list) else value


def scaling_of(value: Any) -> RopeScaling | None:
    """A scaling as itself, or from the object that a manifest holds."""
    return RopeScaling(**value) if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class _Source:
    """The dictionary of one spelling, and what stands beside it in config.json."""

    key: str
    values: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def kind(self) -> Any:
        return self.values.get("rope_type", self.values.get("type", "default"))

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; ``default`` where the key is absent or null."""
        value = self.values.get(name)
        return positive_number(f"config.json: {self.key}.{name}", default if value is None else value)

    @property
    def length(self) -> int:
        return int(self.config.get("max_position_embeddings") or DEFAULT_LENGTH)

    @property
    def original_length(self) -> int:
        """What stands beside the dictionary wins, as in transformers; where there is none, the model's own length."""
        value = self.config.get(_LENGTH) or self.values.get(_LENGTH) or self.length
        return positive_integer(f"config.json: {self.key}.{_LENGTH}", value)


def rope_from_hf(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """``rope_theta`` and the scaling of a config.json; None is no scaling.

    Raises:
        CheckpointError: a kind or a value that is not supported, a missing number, or two spellings that contradict each other.
    """
    sources = [_Source(key, _mapping(key, config[key]), config) for key in SPELLINGS if config.get(key)]
    scalings = [_read(source) for source in sources]
    if len(set(scalings)) > 1:
        kinds = " and ".join(f"{source.key} ({source.kind})" for source in sources)
        raise CheckpointError(f"config.json: {kinds} contradict each other", hint="keep the one that the model was trained with")
    return _theta(config, sources), scalings[0] if scalings else None


def unknown_rope_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys inside ``rope_scaling`` or ``rope_parameters`` that its kind does not use: `rope_scaling.beta_fast`."""
    sources = [_Source(key, config[key], config) for key in SPELLINGS if config.get(key)]
    return sorted(f"{source.key}.{name}" for source in sources for name in source.values.keys() - HARMLESS - KINDS[source.kind].keys)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosine and sine by where nothing else is said (arXiv:2309.00071 §3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key} must be an object, got {value!r}")
    by_layer = sorted(name for name, inner in value.items() if isinstance(inner, Mapping))
    if by_layer:
        raise CheckpointError(f"config.json: {key} differs by kind of layer ({', '.join(by_layer)}); supported: one for all layers")
    return value


def _theta(config: Mapping[str, Any], sources: list[_Source]) -> float:
    places = {"rope_theta": config.get("rope_theta")} | {f"{source.key}.rope_theta": source.values.get("rope_theta") for source in sources}
    given = {place: positive_number(f"config.json: {place}", value) for place, value in places.items() if value is not None}
    if len(set(given.values())) > 1:
        raise CheckpointError(f"config.json: {', '.join(f'{place} = {value:g}' for place, value in given.items())}: they must be equal")
    return next(iter(given.values()), DEFAULT_THETA)


def _read(source: _Source) -> RopeScaling | None:
    spelled = [source.values[name] for name in ("rope_type", "type") if source.values.get(name) is not None]
    if len(set(map(str, spelled))) > 1:
        raise CheckpointError(f"config.json: {source.key} has rope_type {spelled[0]!r} and type {spelled[1]!r}: they must be equal")
    if not isinstance(source.kind, str) or source.kind not in KINDS:
        raise CheckpointError(f"config.json: {source.key}.rope_type = {source.kind!r} is not supported; supported: {', '.join(map(repr, KINDS))}")
    for name, allowed in REFUSED.items():
        if source.values.get(name) not in allowed:
            raise CheckpointError(
                f"config.json: {source.key}.{name} = {source.values[name]!r} is not supported; supported: {', '.join(map(repr, allowed))}"
            )
    return KINDS[source.kind].read(source)


def _read_factor(source: _Source) -> RopeScaling:
    return RopeScaling(rope_type=source.kind, factor=source.number("factor"))


def _read_llama3(source: _Source) -> RopeScaling:
    return RopeScaling(
        rope_type="llama3",
        factor=source.number("factor"),
        original_max_position_embeddings=source.original_length,
        low_freq_factor=source.number("low_freq_factor"),
        high_freq_factor=source.number("high_freq_factor"),
    )


def _read_yarn(source: _Source) -> RopeScaling:
    ratio = source.length / source.original_length
    null = "factor" in source.values and source.values["factor"] is None  # transformers takes the ratio then, and refuses an absent key
    factor = ratio if null else source.number("factor")
    default = yarn_attention_factor(factor)
    if source.values.get("mscale") and source.values.get("mscale_all_dim"):
        default = yarn_attention_factor(factor, source.number("mscale")) / yarn_attention_factor(factor, source.number("mscale_all_dim"))
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=source.original_length,
        attention_factor=source.number("attention_factor", default),
        beta_fast=source.number("beta_fast", 32.0),
        beta_slow=source.number("beta_slow", 1.0),
        truncate=bool(source.values.get("truncate", True)),
    )


def _read_longrope(source: _Source) -> RopeScaling:
    """Factors that change with the length of the text would need two tables, chosen at run time; equal ones are a fixed table."""
    short, long = source.values.get("short_factor"), source.values.get("long_factor")
    if not isinstance(short, list) or not short or short != long or source.values.get("attention_factor") is None:
        raise CheckpointError(
            f"config.json: {source.key}.rope_type = 'longrope' is not supported where short_factor and long_factor differ or attention_factor is not "
            "given: the frequencies change with the length of the text"
        )
    factors = tuple(positive_number(f"config.json: {source.key}.short_factor[{index}]", value) for index, value in enumerate(short))
    return RopeScaling(rope_type="longrope", attention_factor=source.number("attention_factor"), frequency_factors=factors)


@dataclass(frozen=True)
class _Kind:
    """How a kind is read, and which keys that takes."""

    read: Callable[[_Source], RopeScaling | None]
    keys: frozenset[str]


KINDS: Mapping[str, _Kind] = {
    "default": _Kind(lambda source: None, frozenset()),
    "linear": _Kind(_read_factor, frozenset({"factor"})),
    "dynamic": _Kind(_read_factor, frozenset({"factor"})),
    "llama3": _Kind(_read_llama3, frozenset({"factor", "low_freq_factor", "high_freq_factor", _LENGTH})),
    "yarn": _Kind(_read_yarn, frozenset({"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _LENGTH})),
    "longrope": _Kind(_read_longrope, frozenset({"short_factor", "long_factor", "attention_factor", "factor", _LENGTH})),
}
"""``rope_type`` → how it is read; any other is refused by name."""
