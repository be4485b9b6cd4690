"""Write a rewritten graph with its weights beside it: whole, or not at all; weights are copied in pieces and never held in memory.

The weights go into a file that is named after them, ``<graph>.<12 hex digits>.data``; then the graph, which points to it, takes its place; then the
weights of the graph that was there before are removed. So whatever moment a run is killed at, the graph that is there has its own weights.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from artifact.errors import FusionError
from artifact.manifest import atomic_write
from artifact.progress import Progress, silent
from graphs.foreign.source import external_tensors

ALIGNMENT = 64
PIECE_BYTES = 16 * 2**20
LEFTOVER = re.compile(r"\.llama2trt-.+\.[0-9a-f]{12}\.data")
"""Weights that are being written (artifact.manifest.atomic_write), or were when a run was killed."""
Place = tuple[str, int, int]
"""Where the bytes of a tensor are stored: file, offset, length."""


def save_graph(model: ir.Model, source: Path, out: Path, *, progress: Progress = silent) -> int:
    """Write ``out``; the weights that the graph still uses go to a file beside it.

    In the source's own folder the graph points to the external data that is there, and only what the source holds itself is copied.

    Returns:
        Bytes copied.

    Raises:
        FusionError: out is the source itself, or the weights can't be read.
        ArtifactError: the system refuses to write.
    """
    if out.resolve() == source.resolve():
        raise FusionError(f"--out {out} is the graph that is read", hint="give another file to --out")
    try:
        before = _data_files(out)
        try:
            copied = _copy_data(model, source, out, progress)
            with atomic_write(out) as graph_file:
                ir.save(model, graph_file)
        except BaseException:
            _remove(_data_files(out) - before)
            raise
        _remove(_data_files(out) - {out.parent / tensor.location for tensor in external_tensors(model)})
    except OSError as error:
        raise FusionError(f"{out} can't be written: {error}", hint="check the folder, its permissions and free space") from error
    return copied


def _copy_data(model: ir.Model, source: Path, out: Path, progress: Progress) -> int:
    """Copy what the graph's external tensors hold, once each, and let them point to the copy; what may stay where it is stays."""
    stays = out.resolve().parent == source.resolve().parent
    tensors = [tensor for tensor in external_tensors(model) if not stays or tensor.location == source.resolve().name]
    places, end = _lay_out(tensors)
    if not places:
        return 0
    folder = source.resolve().parent
    data = out.with_name(f"{out.name}.{_digest(folder, places)}.data")
    _remove_leftovers(out.parent)
    with ExitStack() as until_renamed, atomic_write(data) as temporary:
        file = until_renamed.enter_context(temporary.open("wb"))
        fcntl.flock(file, fcntl.LOCK_EX)  # so long it is no leftover
        for done, ((location, start, length), offset) in enumerate(places.items()):
            progress("copying weights", done, len(places))
            file.write(b"\0" * (offset - file.tell()))
            with (folder / location).open("rb") as stored:
                _copy(stored, file, start, length)
        file.flush()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and _place(tensor) in places:
            offset, shape = places[_place(tensor)], ir.Shape(tensor.shape)
            value.const_value = ir.ExternalTensor(data.name, offset, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name, base_dir=data.parent)
    return end


def _lay_out(tensors: Iterable[ir.ExternalTensor]) -> tuple[dict[Place, int], int]:
    """Where each stored tensor goes in the copy, and how long that is."""
    places: dict[Place, int] = {}
    end = 0
    for tensor in tensors:
        if _place(tensor) not in places:
            places[_place(tensor)] = end + -end % ALIGNMENT
            end = places[_place(tensor)] + tensor.nbytes
    return places, end


def _place(tensor: ir.ExternalTensor) -> Place:
    return str(tensor.location), tensor.offset or 0, tensor.nbytes


def _digest(folder: Path, places: Mapping[Place, int]) -> str:
    """What tells one copy from another without reading it: which bytes of which files, by their sizes and times."""
    files = {location: (folder / location).stat() for location, _, _ in places}
    states = sorted((location, state.st_size, state.st_mtime_ns) for location, state in files.items())
    return hashlib.sha256(repr((states, sorted(places.items()))).encode()).hexdigest()[:12]


def _remove_leftovers(folder: Path) -> None:
    """Remove weights that a killed run left half-written, for whatever graph; not those that another run is writing now."""
    for leftover in folder.glob(".llama2trt-*.data") if folder.is_dir() else ():
        if LEFTOVER.fullmatch(leftover.name):
            with suppress(OSError), leftover.open("r+b") as file:  # what is locked, or another user's, stays
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()


def _data_files(out: Path) -> set[Path]:
    """The weights of this graph, and of those that were at ``out`` before."""
    name = re.compile(re.escape(out.name) + r"\.[0-9a-f]{12}\.data")
    return {path for path in out.parent.iterdir() if name.fullmatch(path.name)} if out.parent.is_dir() else set()


def _remove(files: set[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _copy(stored: BinaryIO, out: BinaryIO, start: int, length: int) -> None:
    stored.seek(start)
    while length:
        piece = stored.read(min(length, PIECE_BYTES))
        if not piece:
            raise OSError(f"{stored.name} ended {length} bytes early")
        out.write(piece)
        length -= len(piece)
