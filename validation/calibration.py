"""What enters every linear of the float32 reference on calibration sequences, as the file that quantisation reads.

Layer by layer: a layer's weights and what was gathered at its four sites are in memory, and gone when they are written. The weights are the
artifact's own: those that will be quantised. What the file holds: graphs/quantize/statistics.py.
Letters: L tokens of a sequence, n sampled rows, m rows at position 0.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from artifact.calibration import SAMPLES
from artifact.config import LlamaConfig
from artifact.errors import QuantizationError
from artifact.layout import PACKED, layer_prefix, linear_shapes
from artifact.progress import Progress, silent
from artifact.steps import StepContext
from artifact.tensor_file import plan_tensors
from artifact.tensor_store import store_tensors
from exporter.rope import rotary_tables
from graphs.quantize.statistics import FIELDS, PART_ABSMAX, PART_SAMPLES
from validation.calibration_text import CalibrationText
from validation.reference import Reference

Picks = list[NDArray[np.int64]]
ALONE = ("self_attn.o_proj", "mlp.down_proj")
READERS = {packed: members[0] for packed, members in PACKED.items()} | dict(zip(ALONE, ALONE, strict=True))
"""Site within a layer → a linear that reads it."""
SEED = 0
PARTS = 4
"""Of the text, one after the other, so that each is of other documents; fewer where there are fewer sequences."""
LARGEST = float(np.finfo(np.float16).max)
HALF, STORED = ("samples", "first"), (*FIELDS, PART_ABSMAX)
"""Fields that are stored in float16, and all in their order."""
PLAINLY = "--calibration none rounds weights without looking at activations"


def write_statistics(step: StepContext, reference: Reference, text: CalibrationText, fingerprint: str, file: str) -> dict[str, Any]:
    """Run the sequences through the reference and write what enters its linears.

    Args:
        step: the artifact.
        reference: on the artifact's weights.
        text: the sequences.
        fingerprint: of the model, to be told by.
        file: where to, in the artifact.

    Returns:
        file, bytes, text, sha256, documents, sequences, tokens, length, samples, seed, largest {name, value}.

    Raises:
        QuantizationError: an activation is NaN, Inf or beyond float16 (site, token and sequence are named); the disk is too small.
    """
    picks = choose_rows([len(ids) for ids in text.sequences])
    firsts = 1 if text.bos is not None else len(text.sequences)  # what follows a common first token does not reach back to it
    parts = _parts(len(text.sequences))
    rows = {"absmax": (), "mean_square": (), "samples": (sum(map(len, picks)),), "first": (firsts,), PART_ABSMAX: (max(parts) + 1,)}
    shapes = {
        f"{layer_prefix(layer)}.{site}.{name}": ("F16" if name in HALF else "F32", (*rows[name], width))
        for layer in range(reference.config.num_hidden_layers)
        for site, width in site_widths(reference.config).items()
        for name in STORED
    }
    described = {
        "text": text.name,
        "sha256": text.sha256,
        "documents": text.documents,
        "sequences": len(text.sequences),
        "tokens": text.tokens,
        "length": max(map(len, text.sequences)),
        "samples": sum(map(len, picks)),
        "seed": SEED,
    }
    of_parts = np.bincount(parts, weights=[len(chosen) for chosen in picks]).astype(int)
    metadata = {name: str(value) for name, value in described.items()} | {"model": fingerprint, PART_SAMPLES: " ".join(map(str, of_parts))}
    header, planned = plan_tensors(file, shapes, metadata)
    size = planned[-1].offset + planned[-1].length
    _check_room(step, file, size)
    largest: dict[str, float] = {}
    store_tensors(step, file, header, planned, _blocks(measure_sites(reference, text, picks, firsts, step.progress), largest))
    peak = max(largest, key=lambda name: largest[name], default=None)
    return {
        "file": file,
        "bytes": size,
        **described,
        **({} if peak is None else {"largest": {"name": peak, "value": largest[peak]}}),
    }


def _check_room(step: StepContext, file: str, size: int) -> None:
    """A file of gigabytes is refused before hours of work, not after."""
    free = shutil.disk_usage(step.artifact).free
    if size > free and not (step.journal and file in step.journal.files):
        short = f"{file} takes {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on this disk"
        raise QuantizationError(f"{step.artifact}: {short}", hint="free some space, or give a smaller --calibration-tokens, or --calibration none")


def _parts(sequences: int) -> list[int]:
    """Which part of the text each sequence is of."""
    count = min(PARTS, sequences)
    return [index * count // sequences for index in range(sequences)]


def site_widths(config: LlamaConfig) -> dict[str, int]:
    """Site within a layer → channels of its input."""
    shapes = linear_shapes(config)
    return {site: shapes[linear][1] for site, linear in READERS.items()}


def choose_rows(lengths: Sequence[int], samples: int = SAMPLES) -> Picks:
    """Which positions of each sequence are sampled: all but 0, or as many of them as ``samples`` allows, drawn by a seed."""
    starts = np.cumsum([0, *(length - 1 for length in lengths)])
    drawn = np.arange(starts[-1])
    if len(drawn) > samples:
        drawn = np.sort(np.random.default_rng(SEED).choice(len(drawn), samples, replace=False))
    bounds = np.searchsorted(drawn, starts)
    return [drawn[first:last] - start + 1 for first, last, start in zip(bounds[:-1], bounds[1:], starts[:-1], strict=True)]


@torch.inference_mode()
def measure_sites(reference: Reference, text: CalibrationText, picks: Picks, firsts: int, progress: Progress = silent) -> Iterator[Site]:
    """Every site of every layer, when all sequences have gone through its layer."""
    config = reference.config
    states, tables = reference.embed(text.sequences), rotary_tables(config, torch.float32)
    parts = _parts(len(states))
    for number in range(config.num_hidden_layers):
        progress("calibrating, layer by layer", number, config.num_hidden_layers)
        layer = reference.decoder_layer(number)
        sites = [Site(f"{layer_prefix(number)}.{site}", width) for site, width in site_widths(config).items()]
        for site, linear in zip(sites, READERS.values(), strict=True):
            layer.get_submodule(linear).register_forward_pre_hook(site.watch)
        for index, (state, chosen) in enumerate(zip(states, picks, strict=True)):
            for site in sites:
                site.expect(index, chosen, parts[index], first=index < firsts)
            states[index], _ = reference.advance(layer, state, tables)
        del layer  # before the next one is read
        yield from sites


class Site:
    """What was gathered of one input of linears."""

    def __init__(self, name: str, width: int) -> None:
        self.name, self.absmax, self.squares, self.rows = name, torch.zeros(width), torch.zeros(width, dtype=torch.float64), 0
        self.samples: list[Tensor] = []
        self.first: list[Tensor] = []
        self.part_absmax: list[Tensor] = []

    def expect(self, sequence: int, chosen: NDArray[np.int64], part: int, *, first: bool) -> None:
        """What comes next, of which part of the text, and what of it is kept: the positions ``chosen``, and position 0 where ``first``."""
        self._sequence, self._chosen, self._keep_first = sequence, torch.from_numpy(chosen), first
        if part == len(self.part_absmax):
            self.part_absmax.append(torch.zeros_like(self.absmax))

    def watch(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        """A forward pre-hook of the linear: its input is [1, L, in]."""
        values = inputs[0][0]
        magnitudes = values.abs()
        later = magnitudes[1:].amax(dim=0)
        largest = torch.maximum(later, magnitudes[0])
        if not bool((largest <= LARGEST).all()):
            self._refuse(values)
        self.absmax = torch.maximum(self.absmax, largest)
        self.part_absmax[-1] = torch.maximum(self.part_absmax[-1], later)
        self.squares += values[1:].square().sum(dim=0).double()
        self.rows += len(values) - 1
        self.samples.append(values[self._chosen].half())
        if self._keep_first:
            self.first.append(values[:1].half())

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Field → its array, as stored."""
        mean_square = (self.squares / max(self.rows, 1)).float()
        rows = {"samples": torch.cat(self.samples), "first": torch.cat(self.first), PART_ABSMAX: torch.stack(self.part_absmax)}
        return {field: tensor.numpy() for field, tensor in {"absmax": self.absmax, "mean_square": mean_square, **rows}.items()}

    def _refuse(self, values: Tensor) -> None:
        token, channel = (int(index) for index in (~(values.abs() <= LARGEST)).nonzero()[0])
        value = float(values[token, channel])
        where = f"at token {token} of calibration sequence {self._sequence} (channel {channel})"
        if np.isfinite(value):
            raise QuantizationError(f"the input of {self.name} reaches {value:,.0f} {where}, float16 holds {LARGEST:,.0f}", hint=PLAINLY)
        raise QuantizationError(f"the input of {self.name} is {value} {where}", hint="python cli.py validate ART says where the weights are damaged")


def _blocks(sites: Iterator[Site], largest: dict[str, float]) -> Iterator[memoryview]:
    for site in sites:
        largest[site.name] = float(site.absmax.max())
        arrays = site.arrays()
        site.samples.clear()
        for field in STORED:
            yield np.ascontiguousarray(arrays[field]).data.cast("B")
