"""Read an ONNX file and leave its weights where they are: what the file itself stores becomes external data, at its offset in that file.

A file is a protobuf message: fields one after the other, each a tag (number, wire type) and, for text, bytes and messages, a length. So the model,
its graph and the initializers are walked field by field, ``raw_data`` is skipped, and all else is read as it stands.
Source: https://protobuf.dev/programming-guides/encoding; field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""Field numbers in ModelProto, GraphProto and TensorProto."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; 3 and 4 are groups, which ONNX has none of."""
LAZY_BYTES = 1 << 20
"""Initializers from this size on stay in the file; what is smaller may be part of the graph's structure, which is looked into."""
LONGEST_VARINT = 10


@dataclass(frozen=True)
class Field:
    """One field of a message: where its tag starts, where its content starts and where it ends."""

    number: int
    wire: int
    start: int
    content: int
    end: int


def load_lazily(path: Path, *, lazy_bytes: int = LAZY_BYTES) -> ir.Model:
    """The model of an ONNX file; the bytes of its large initializers are read when they are used.

    Args:
        path: the file.
        lazy_bytes: size of an initializer from which on it is left in the file.

    Raises:
        ValueError: the file is no protobuf message, or ends too early.
        google.protobuf.message.DecodeError: it is a message, but not a model.
    """
    path = path.resolve()  # a link's target holds the bytes
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        proto = onnx.ModelProto.FromString(_model(file, size, path.name, lazy_bytes))
    model: ir.Model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def _model(file: BinaryIO, size: int, name: str, lazy_bytes: int) -> bytes:
    """The message of a model whose large initializers are external."""
    message = []
    for field in list(_fields(file, 0, size)):
        if field.number == GRAPH and field.wire == BYTES:
            graph = b"".join(_graph(file, field, name, lazy_bytes))
            message += [_varint(GRAPH << 3 | BYTES), _varint(len(graph)), graph]
        else:
            message.append(_read(file, field.start, field.end))
    return b"".join(message)


def _graph(file: BinaryIO, graph: Field, name: str, lazy_bytes: int) -> Iterator[bytes]:
    start = graph.content
    for field in _fields(file, graph.content, graph.end):
        if field.number == INITIALIZER and field.end - field.content >= lazy_bytes:
            yield _read(file, start, field.start)
            tensor = _tensor(file, field, name)
            yield from (_varint(INITIALIZER << 3 | BYTES), _varint(len(tensor)), tensor)
            start = field.end
    yield _read(file, start, graph.end)


def _tensor(file: BinaryIO, tensor: Field, name: str) -> bytes:
    """The message of a tensor that points to where its bytes are; one that holds them in another way than as ``raw_data`` is as it was."""
    fields = list(_fields(file, tensor.content, tensor.end))
    raw = [field for field in fields if field.number == RAW_DATA and field.wire == BYTES]
    if len(raw) != 1:
        return _read(file, tensor.content, tensor.end)
    proto = onnx.TensorProto.FromString(b"".join(_read(file, field.start, field.end) for field in fields if field is not raw[0]))
    place = {"location": name, "offset": raw[0].content, "length": raw[0].end - raw[0].content}
    proto.data_location = onnx.TensorProto.EXTERNAL
    del proto.external_data[:]
    for key, value in place.items():
        proto.external_data.add(key=key, value=str(value))
    return bytes(proto.SerializeToString())


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[Field]:
    """The fields of a message; the file may be moved about between two of them."""
    while start < end:
        file.seek(start)
        tag = _read_varint(file)
        wire, content = tag & 7, file.tell()
        if wire == VARINT:
            _read_varint(file)
            stop = file.tell()
        elif wire in (FIXED64, FIXED32):
            stop = content + (8 if wire == FIXED64 else 4)
        elif wire == BYTES:
            length = _read_varint(file)
            content = file.tell()
            stop = content + length
        else:
            raise ValueError(f"no protobuf message: byte {start} has wire type {wire}")
        if stop > end:
            raise ValueError(f"field {tag >> 3} at byte {start} ends at byte {stop}, what holds it at {end}")
        yield Field(tag >> 3, wire, start, content, stop)
        start = stop


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _read_varint(file: BinaryIO) -> int:
    value = 0
    for index in range(LONGEST_VARINT):
        byte = file.read(1)
        if not byte:
            raise ValueError("the file ends within a number")
        value |= (byte[0] & 0x7F) << 7 * index
        if byte[0] < 0x80:  # the top bit says whether another byte follows
            return value
    raise ValueError(f"no protobuf message: a number of more than {LONGEST_VARINT} bytes")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
