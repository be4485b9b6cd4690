"""Compare the tensors of a checkpoint with those its config asks for, before a byte is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

from artifact.config import LlamaConfig
from artifact.errors import CheckpointError
from artifact.layout import EMBEDDING, LM_HEAD, layer_of, tensor_shapes

NOT_WEIGHTS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs)|rope_freqs\.weight")
"""Tables that follow from the config, stored by older exporters (they are in the published Llama 2 files)."""

TIED = 'a model that uses its embedding as lm_head says so in its config: "tie_word_embeddings": true'
BIASED = 'a model with biases says so in its config: "attention_bias": true, "mlp_bias": true'
PARTLY_BIASED = "a Llama has a bias on all four linears of attention or on none, and on all three of the MLP or on none"

TAKEN = "remove the one that is not the model's, or take the file from where it was published"

NAMED = 5
"""How many tensors a message names before it counts the rest."""


Stored = TypeVar("Stored")
Place = TypeVar("Place", bound=Hashable)


def by_model_name(stored: Mapping[str, Stored], place: Callable[[str], Place]) -> dict[Place, Stored]:
    """What a file stores, by the place that each name of the file has in the model.

    Raises:
        CheckpointError: two names have one place; which of them is the model can't be known.
    """
    origin: dict[Place, str] = {}
    for name in stored:
        taken = origin.setdefault(place(name), name)
        if taken != name:
            raise CheckpointError(f"tensors {taken} and {name} are two names of one weight", hint=TAKEN)
    return {where: stored[name] for where, name in origin.items()}


def check_tensors(
    config: LlamaConfig, found: Mapping[str, tuple[int, ...]], *, equal: Callable[[str, str], bool]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Check names and shapes against the config.

    Args:
        config: what the weights must fit.
        found: Hugging Face name → shape, as the checkpoint has them.
        equal: says whether two tensors of the checkpoint hold the same values.

    Returns:
        name → shape of the model's weights in stored order, and the names that were dropped because they are not weights.

    Raises:
        CheckpointError: another number of layers, a missing or an extra tensor, another shape, or a tied lm_head that is not the embedding.
    """
    dropped = sorted(name for name in found if NOT_WEIGHTS.fullmatch(name))
    weights = {name: shape for name, shape in found.items() if name not in dropped}
    _check_layers(config, weights)
    expected = tensor_shapes(config)
    if config.tie_word_embeddings and LM_HEAD in weights:
        _check_tied(weights, equal)
        del weights[LM_HEAD]
        dropped.append(LM_HEAD)
    _check_names(expected, weights)
    _check_shapes(expected, weights)
    return expected, dropped


def _check_layers(config: LlamaConfig, weights: Iterable[str]) -> None:
    held = 1 + max((layer for name in weights if (layer := layer_of(name)) is not None), default=-1)
    if held != config.num_hidden_layers:
        raise CheckpointError(
            f"config has {config.num_hidden_layers} layers, weights hold {held}",
            hint="take config and weights from the same model; num_hidden_layers must be the number of layers stored",
        )


def _check_tied(weights: Mapping[str, tuple[int, ...]], equal: Callable[[str, str], bool]) -> None:
    if weights.get(EMBEDDING) != weights[LM_HEAD] or not equal(EMBEDDING, LM_HEAD):
        raise CheckpointError(
            f"the config ties lm_head to the embedding, but {LM_HEAD} differs from {EMBEDDING}",
            hint='set "tie_word_embeddings": false in config.json if the model has an lm_head of its own',
        )


def _check_names(expected: Mapping[str, object], weights: Mapping[str, object]) -> None:
    missing = [name for name in expected if name not in weights]
    extra = sorted(name for name in weights if name not in expected)
    if missing:
        hint = TIED if missing == [LM_HEAD] else PARTLY_BIASED if _biases(missing) else "download the checkpoint again; a file may be missing"
        raise CheckpointError(f"missing {_listed(missing)}" + (f"; extra {_listed(extra)}" if extra else ""), hint=hint)
    if extra:
        hint = BIASED if _biases(extra) else "adapters and other architectures are not supported; merge or remove them first"
        raise CheckpointError(f"extra {_listed(extra)}: not a weight of a Llama with this config", hint=hint)


def _biases(names: Iterable[str]) -> bool:
    return all(name.endswith(".bias") for name in names)


def _check_shapes(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if weights[name] != shape:
            raise CheckpointError(
                f"tensor {name}: config expects shape {list(shape)}, the checkpoint has {list(weights[name])}",
                hint="take config and weights from the same model",
            )


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ("tensor " if len(names) == 1 else f"{len(names)} tensors: ") + ", ".join(names[:NAMED]) + rest
