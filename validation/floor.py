"""The floor: how far float16 arithmetic alone moves the logits, measured on an implementation that is not ours.

Hugging Face transformers' Llama in PyTorch float16 on the checkpoint's weights, against the float32 reference. Above 1.5 B parameters PyTorch's
float16 kernels take minutes and the model no longer fits: there the reference itself runs in float16, layer by layer, its products in float32
kernels rounded to float16 (within 9 % of the former, and 4 × faster).
Letters: L tokens, V vocab.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from artifact.config import LlamaConfig
from artifact.hashing import sha256_of
from artifact.layout import LARGE, LM_HEAD, parameter_count, tensor_shapes
from artifact.manifest import read_manifest
from artifact.progress import Progress, silent
from artifact.steps import StepContext, rules_hash
from validation import metrics
from validation.reference import Read, Reference, ReferenceRun

FILE = "reports/floor.json"
RULES = (
    "validation/floor.py", "validation/reference.py", "validation/rounded_alongside.py", "validation/metrics.py", "validation/scenarios.py",
    "validation/text.py", "exporter/model.py", "exporter/rope.py", "artifact/config.py", "artifact/layout.py", "artifact/rope_scaling.py",
)  # fmt: skip
"""Source files that decide the floor."""
STREAMED_ABOVE = LARGE
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Floor:
    """Error of float16 arithmetic itself.

    Attributes:
        mean_abs: over positions and vocabulary of the main sequence; None where it can't be had, ``reason`` says why.
        max_abs: largest of the main sequence.
        position_mean, position_max: per sequence, the mean and the largest |error| of every position [L].
        source: what was run.
        mean_kl: of the reference against transformers' float16 on all positions, nats: whether the reference is the right model at all; None where
            transformers was not run.
    """

    mean_abs: float | None
    max_abs: float | None
    position_mean: list[list[float]]
    position_max: list[list[float]]
    source: str
    reason: str | None = None
    mean_kl: float | None = None

    def noise(self, sequence: int, positions: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """Largest error at each of some positions of a sequence; None where there is no floor."""
        return np.asarray(self.position_max[sequence])[positions] if self.position_max else None

    def mean_at(self, sequence: int, positions: NDArray[np.int64]) -> float | None:
        """Mean error at some positions of a sequence: what a part of a scenario is measured by; None where there is nothing to measure by."""
        return float(np.asarray(self.position_mean[sequence])[positions].mean()) if self.mean_abs else None

    @property
    def missing(self) -> str:
        """Why nothing can be a multiple of it."""
        return "the floor is 0: float16 changes nothing on these tokens" if self.mean_abs == 0 else f"no floor: {self.reason}"

    def as_report(self) -> dict[str, Any]:
        """mean_abs, max_abs, mean_kl, source and reason."""
        return {key: getattr(self, key) for key in ("mean_abs", "max_abs", "mean_kl", "source", "reason")}


def no_floor(reason: str, source: str = "not measured") -> Floor:
    """A floor that can't be had, or is not needed."""
    return Floor(None, None, [], [], source, reason)


def measure_floor(
    step: StepContext,
    fingerprint: str,
    reference: Reference,
    sequences: Sequence[Ids],
    runs: Sequence[ReferenceRun],
    rounded: Sequence[ReferenceRun] = (),
) -> Floor:
    """The floor of a checkpoint on some sequences, the main one first; measured once and kept in ``reports/floor.json``.

    A kept floor is taken only where it is the file that the last ``validate`` recorded: a changed one would move every gate.

    Args:
        step: the artifact.
        fingerprint: of the checkpoint.
        reference: on the checkpoint's weights.
        sequences: token ids [L] each.
        runs: what the reference computed for them.
        rounded: what it computed rounded to float16 (rounded_alongside.py); empty where that is still to be done.
    """
    source = floor_source(reference.config)
    key = floor_key(fingerprint, sequences, source)
    floor = _kept(step, key) or compute_floor(reference, sequences, runs, rounded, step.progress)
    with step.write(FILE) as temporary:  # also where it was kept: the file is an output of this step
        temporary.write_text(json.dumps({"key": key, "floor": asdict(floor)}, indent=1) + "\n", encoding="utf-8")
    return floor


def compute_floor(
    reference: Reference,
    sequences: Sequence[Ids],
    runs: Sequence[ReferenceRun],
    rounded: Sequence[ReferenceRun] = (),
    progress: Progress = silent,
) -> Floor:
    """The floor of a checkpoint on some sequences, measured; arguments as in ``measure_floor``."""
    progress("float16 floor", 0, 1)
    streamed, source = _is_streamed(reference.config), floor_source(reference.config)
    half = streamed_logits(reference, sequences, rounded) if streamed else transformers_logits(reference.config, reference.read, sequences)
    floor = compare(half, [run.logits() for run in runs], source)
    return replace(floor, mean_kl=None) if streamed else floor  # our own model again: it says nothing about the reference


def floor_source(config: LlamaConfig) -> str:
    """What is run for a model of this size."""
    if _is_streamed(config):
        return "our model in float16, layer by layer, products in float32 kernels"
    return f"transformers {metadata.version('transformers')} LlamaForCausalLM float16"


def _is_streamed(config: LlamaConfig) -> bool:
    return parameter_count(config) > STREAMED_ABOVE


def compare(half: Sequence[NDArray[np.float32]], reference: Sequence[NDArray[np.float32]], source: str) -> Floor:
    """Floor from float16 logits and float32 logits, [L, V] per sequence."""
    errors = [metrics.absolute_errors(ours, theirs) for ours, theirs in zip(half, reference, strict=True)]
    for index, (mean, _) in enumerate(errors):
        if not np.isfinite(mean).all():
            first = int(np.flatnonzero(~np.isfinite(mean))[0])
            return no_floor(f"float16 logits are not finite from position {first} of sequence {index} on: the model overflows float16", source)
    mean, largest = errors[0]
    kl = np.concatenate([metrics.kl_divergence(ours, theirs) for ours, theirs in zip(half, reference, strict=True)])
    means, maxima = ([kind.tolist() for kind in kinds] for kinds in zip(*errors, strict=True))
    return Floor(float(mean.mean()), float(largest.max()), means, maxima, source, mean_kl=float(kl.mean()))


def transformers_logits(config: LlamaConfig, read: Read, sequences: Sequence[Ids], dtype: torch.dtype = torch.float16) -> list[NDArray[np.float32]]:
    """Logits [L, V] of transformers' Llama."""
    model = _transformers_model(config, read, dtype)
    with torch.inference_mode():
        return [model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float().numpy() for ids in sequences]


def streamed_logits(reference: Reference, sequences: Sequence[Ids], rounded: Sequence[ReferenceRun] = ()) -> list[NDArray[np.float32]]:
    """Logits [L, V] of our model in float16, one layer at a time, its products in float32 kernels; of ``rounded`` runs where there are any."""
    with Float32Products():
        runs = rounded or reference.run(sequences, keep_cache=(), dtype=torch.float16)
        return [run.logits() for run in runs]


class Float32Products(TorchFunctionMode):
    """Compute matrix products of float16 tensors, biases added, in float32 and round the result: what hardware with float32 accumulators does."""

    PRODUCTS = frozenset({torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__})

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch instead of ``func``."""
        if func in self.PRODUCTS and args[0].dtype == torch.float16:
            return func(*map(_as_float32, args), **{name: _as_float32(value) for name, value in (kwargs or {}).items()}).half()
        return func(*args, **(kwargs or {}))


def _as_float32(operand: Any) -> Any:
    """A tensor in float32; None, a linear's bias that is not there, stays."""
    return operand.float() if isinstance(operand, torch.Tensor) else operand


def _transformers_model(config: LlamaConfig, read: Read, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig as TransformersConfig  # noqa: PLC0415 - slow to import, and not needed where the floor is kept
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    with _quiet(), torch.device("meta"):
        model = LlamaForCausalLM(TransformersConfig(**config.to_hf()))
    weights = {name: read(name).to(dtype) for name in tensor_shapes(config)}
    model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are computed, not loaded
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, f"{LM_HEAD if LM_HEAD in left else left} has no weight"
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def floor_key(fingerprint: str, sequences: Sequence[Ids], source: str) -> dict[str, str]:
    """All that a floor depends on."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, np.int64).tobytes())
    return {"checkpoint": fingerprint, "tokens": digest.hexdigest(), "source": source, "torch": torch.__version__, "rules": rules_hash(RULES)}


def _kept(step: StepContext, key: dict[str, str]) -> Floor | None:
    path = step.artifact / FILE
    try:
        finished = step.finished(FILE)  # of an interrupted run, which no manifest records
        recorded = (finished or read_manifest(step.artifact)["steps"]["validate"]["outputs"][FILE])["sha256"]
        if sha256_of(path) != recorded:
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Floor(**kept["floor"]) if kept["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # absent, unreadable or not recorded: measured again
