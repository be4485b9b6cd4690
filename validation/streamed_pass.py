"""Take batches of calls through the cuts of a graph, one layer in memory at a time.

Layer-major: a layer is opened once, all calls of all batches go through it in order, each batch with that layer's cache, and it is closed before the
next is opened. That is possible because every token is known beforehand. Shared values (mask, rotary values, shapes) come from the shared cut, once a
call; hidden states go from cut to cut.
Letters: B batch, S new tokens of a call, E hidden, K kv heads, D head_dim, W columns or slots of a cache, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifact import io_spec
from artifact.config import LlamaConfig
from artifact.errors import ValidationError
from artifact.io_spec import Dtype
from artifact.progress import Progress
from graphs.joined import Cuts
from validation.calls import AnyCall, StaticCall
from validation.cut_session import entering, open_cut, widen
from validation.in_place import check_room, run_in_place
from validation.spill import Spill
from validation.time_left import TimeLeft

Array = NDArray[Any]


@dataclass
class Batch:
    """Calls of one batch, in order, and how far they have come.

    Attributes:
        calls: all of them, their tokens known.
        slots: of a static cache; 0 of a dynamic one.
        fill: what the slots hold before they are written.
        keeps_caches: whether the caches after the last call are kept.
        shared: for each call, name → what the shared cut gave it, without the hidden state.
        hidden: for each call, [B, S, E]: what left the last cut; float32 of a float16 graph too.
        caches: keys and values of each finished layer in turn after the last call [B, K, W, D]; empty where they are not kept.
    """

    calls: tuple[AnyCall, ...]
    slots: int = 0
    fill: float = 0.0
    keeps_caches: bool = False
    shared: list[dict[str, Array]] = field(default_factory=list, repr=False)
    hidden: list[Array] = field(default_factory=list, repr=False)
    caches: list[Array] = field(default_factory=list, repr=False)

    @property
    def rows(self) -> int:
        """Rows of the batch, B."""
        return len(self.calls[0].input_ids)

    def width(self, call: AnyCall) -> int:
        """Columns or slots of a cache before a call."""
        return self.slots if isinstance(call, StaticCall) else call.start

    def enter(self, layer: int) -> None:
        """Before its calls go through a layer, from what left the last."""

    def leave(self, layer: int) -> None:
        """After its calls went through a layer."""


class StreamedPass:
    """The cuts of a graph, ready to be run.

    Args:
        cuts: of the graph.
        config, dtype: the model it is.
        name: of the graph, for errors and progress.
        spill: where caches are kept.
        progress: told the layer, and how long the rest will take.
    """

    def __init__(self, cuts: Cuts, config: LlamaConfig, dtype: Dtype, name: str, spill: Spill, progress: Progress) -> None:
        self._cuts, self._config, self._dtype, self._name, self._spill, self._progress = cuts, config, dtype, name, spill, progress

    def run(self, batches: Sequence[Batch]) -> None:
        """Take batches through the shared cut and all layers; their hidden states and caches are then the last layer's and all layers'."""
        total = len(self._cuts.layers)
        session = self._open(self._cuts.shared, "what the layers share")
        for batch in batches:
            self._share(session, batch)
        del session
        clock = TimeLeft(total)
        for number, cut in enumerate(self._cuts.layers):
            self._progress(f"{self._name}: layer {number}{clock.left(number)}", number, total)
            session = self._open(cut, f"layer {number}")
            for batch in batches:
                self._advance(session, number, cut, batch)
            del session  # before the next one is opened

    def open_tail(self) -> Any:
        """A session of what follows the last layer."""
        return self._open(self._cuts.tail, "what follows the layers")

    def logits(self, tail: Any, batch: Batch, number: int) -> Array:
        """Logits [B, S, V] or [B, 1, V] of one call of a batch that has been run."""
        call = batch.calls[number]
        (logits,) = self._run(tail, [io_spec.LOGITS], call.inputs() | entering(self._cuts.tail, batch.hidden[number]), call)
        return logits

    def _open(self, cut: ir.Model, what: str) -> Any:
        return open_cut(widen(cut), f"{what} of {self._name}")

    def _share(self, session: Any, batch: Batch) -> None:
        names = [str(value.name) for value in self._cuts.shared.graph.outputs]
        for call in batch.calls:
            first, *others = self._run(session, names, call.inputs() | self._idle_caches(batch, call), call)
            batch.hidden.append(first)
            batch.shared.append(dict(zip(names[1:], others, strict=True)))

    def _idle_caches(self, batch: Batch, call: AnyCall) -> dict[str, Array]:
        """Caches that the shared cut reads: their sizes, never what they hold."""
        read = {str(value.name) for value in self._cuts.shared.graph.inputs}
        pasts = [past for past, _ in io_spec.cache_names(self._config) if past in read]
        return {past: self._empty(batch, batch.width(call)) for past in pasts}

    def _advance(self, session: Any, layer: int, cut: ir.Model, batch: Batch) -> None:
        """All calls of a batch through one layer, from an empty cache."""
        names = [(io_spec.past_name(layer, kind), io_spec.present_name(layer, kind)) for kind in io_spec.CACHE_KINDS]
        leaving = str(cut.graph.outputs[0].name)
        cache = [self._empty(batch, batch.width(batch.calls[0])) for _ in names]
        batch.enter(layer)
        for number, call in enumerate(batch.calls):
            feeds = {**call.inputs(), **batch.shared[number], **entering(cut, batch.hidden[number])}
            feeds |= {past: array for (past, _), array in zip(names, cache, strict=True)}
            if isinstance(call, StaticCall):
                check_room(self._name, call, batch.slots)
                batch.hidden[number] = self._guarded(call, run_in_place, session, leaving, _read(session, feeds), names)
            else:
                batch.hidden[number], *cache = self._run(session, [leaving, *(present for _, present in names)], feeds, call)
        batch.leave(layer)
        if batch.keeps_caches:
            batch.caches += map(self._spill.keep, cache)

    def _empty(self, batch: Batch, width: int) -> Array:
        shape = (batch.rows, self._config.num_key_value_heads, width, self._config.head_dim)
        return np.full(shape, batch.fill, io_spec.NUMPY_DTYPES[self._dtype])

    def _run(self, session: Any, names: list[str], feeds: dict[str, Array], call: AnyCall) -> list[Array]:
        return [np.asarray(output) for output in self._guarded(call, session.run, names, _read(session, feeds))]

    def _guarded(self, call: AnyCall, run: Any, *arguments: Any) -> Any:
        try:
            return run(*arguments)
        except Exception as error:  # its exceptions share no base class
            batch = len(call.input_ids)
            raise ValidationError(f"{self._name}: ONNX Runtime stopped at a batch of {batch} with {call.in_use} positions: {error}") from error


def _read(session: Any, feeds: dict[str, Array]) -> dict[str, Array]:
    """What a session reads of all that is known."""
    return {value.name: feeds[value.name] for value in session.get_inputs()}
