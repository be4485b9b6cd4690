"""Write a rewritten graph with its weights beside it: whole, or not at all; weights are copied in pieces and never held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from artifact.errors import FusionError
from artifact.progress import Progress, silent

ALIGNMENT = 64
PIECE_BYTES = 16 * 2**20


def save_graph(model: ir.Model, source: Path, out: Path, *, progress: Progress = silent) -> int:
    """Write ``out``; in another folder than the source's, the external data that the graph still uses goes to ``<out>.data``.

    In the source's own folder the graph points to the data that is there.

    Returns:
        Bytes copied.

    Raises:
        FusionError: out is the source itself, or can't be written.
    """
    if out.resolve() == source.resolve():
        raise FusionError(f"--out {out} is the graph that is read", hint="give another file to --out")
    data = out.with_name(f"{out.name}.data")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _whole(out) as graph_file, _whole(data) as data_file:
            copied = 0 if out.resolve().parent == source.resolve().parent else _copy_data(model, source, data_file, data.name, progress)
            ir.save(model, graph_file)
    except OSError as error:
        raise FusionError(f"{out} can't be written: {error}", hint="check the folder, its permissions and free space") from error
    return copied


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when all went well, if anything was written; removed otherwise."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        if temporary.exists():
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _copy_data(model: ir.Model, source: Path, file: Path, name: str, progress: Progress) -> int:
    """Copy what the graph's external tensors hold, once each, and let them point to the copy."""
    values = [value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]
    if not values:
        return 0
    places: dict[tuple[str, int, int], int] = {}
    with file.open("wb") as out:
        for done, value in enumerate(values):
            progress("copying weights", done, len(values))
            tensor = value.const_value
            assert isinstance(tensor, ir.ExternalTensor)
            place = (str(tensor.location), tensor.offset or 0, tensor.nbytes)
            if place not in places:
                out.write(b"\0" * (-out.tell() % ALIGNMENT))
                places[place] = out.tell()
                with (source.resolve().parent / tensor.location).open("rb") as stored:
                    _copy(stored, out, place[1], place[2])
            value.const_value = ir.ExternalTensor(
                name, places[place], tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name, base_dir=file.parent
            )
        return out.tell()


def _copy(stored: BinaryIO, out: BinaryIO, start: int, length: int) -> None:
    stored.seek(start)
    while length:
        piece = stored.read(min(length, PIECE_BYTES))
        if not piece:
            raise OSError(f"{stored.name} ended {length} bytes early")
        out.write(piece)
        length -= len(piece)
