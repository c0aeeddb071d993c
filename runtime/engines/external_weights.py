"""Weights that ONNX Runtime is handed, instead of the name of their file.

By name it would map the file and leave parts mapped, and a program that shortens a mapped file kills the process that
reads it; and it refuses a file behind a symbolic link. Here the file is mapped while a session is made, which copies
what it keeps, and no longer.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineFileError
from runtime.foreign import failures

# Types of `onnx.TensorProto` that weights are stored in: bytes of an element, and what NumPy has in their place.
# bfloat16 and float8 are unknown there; ONNX Runtime is told what the bits are.
FLOAT, UINT8, INT8, INT32, INT64, FLOAT16, BFLOAT16, FLOAT8 = 1, 2, 3, 6, 7, 10, 16, 17
STORED_AS = {
    FLOAT: np.float32,
    UINT8: np.uint8,
    INT8: np.int8,
    INT32: np.int32,
    INT64: np.int64,
    FLOAT16: np.float16,
    BFLOAT16: np.uint16,
    FLOAT8: np.uint8,
}
# `onnx.TensorProto.DataLocation`.
EXTERNAL = 1


@dataclass(frozen=True)
class GraphFiles:
    """A graph and the file of its weights, opened and checked: whatever happens to the files, a session is made of
    what was checked. `path` is for messages.
    """

    path: Path
    graph: bytes
    weights: BufferedReader | None


@dataclass(frozen=True)
class ExternalWeight:
    """A weight of a graph: its name, its `onnx_type` and shape, and where in the file of weights it is, in bytes."""

    name: str
    onnx_type: int
    shape: tuple[int, ...]
    offset: int
    length: int

    def of(self, weights: memoryview) -> NDArray:
        """Return the weight, a view of the bytes of the file. Raises `ValueError` where it cannot be there."""
        stored = STORED_AS.get(self.onnx_type)
        if stored is None:
            raise ValueError(f"{self.name} is of type {self.onnx_type}")
        if min(self.shape, default=0) < 0 or math.prod(self.shape) * np.dtype(stored).itemsize != self.length:
            raise ValueError(f"{self.name} of shape {list(self.shape)} has {self.length} bytes")
        if self.offset < 0 or self.offset + self.length > len(weights):
            raise ValueError(f"{self.name} is at {self.offset}, beyond the end of the weights")
        part = weights[self.offset : self.offset + self.length]
        return np.frombuffer(part, dtype=stored).reshape(self.shape)


def external_weights(graph: bytes) -> list[ExternalWeight]:
    """Return the weights that are outside of `graph`, the bytes of an ONNX model. Raises `ValueError` where it is none,
    or where it says of a weight what cannot be read.
    """
    from google.protobuf.message import DecodeError

    try:
        model = _model_proto().FromString(graph)
    except (DecodeError, RecursionError) as error:
        raise ValueError(f"that is no ONNX graph: {error}") from error
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_location == EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
            found.append(ExternalWeight(tensor.name, tensor.data_type, tuple(tensor.dims), offset, length))
    return found


def hand_over(files: GraphFiles, options: Any, onnxruntime: Any) -> list[Any]:
    """Let a session with these options have the weights of `files`; return what must live until it is made.

    Raises `EngineFileError` where the graph and its weights do not go together.
    """
    if files.weights is None:
        return []
    with failures(
        lambda cause: EngineFileError(f"{files.path} and its weights do not go together ({cause}); export it again")
    ):
        wanted = external_weights(files.graph)
        mapped = mmap.mmap(files.weights.fileno(), 0, prot=mmap.PROT_READ)
        names, values = [], []
        for weight in wanted:
            array = weight.of(memoryview(mapped))
            names.append(weight.name)
            values.append(onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, weight.onnx_type))
        options.add_external_initializers(names, values)
    return values


@cache
def _model_proto() -> Any:
    """Return the message `onnx.ModelProto`, with those of its fields that tell where weights are: the runtime does
    without the package onnx.
    """
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
    from google.protobuf.descriptor_pb2 import FileDescriptorProto
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message_factory import GetMessageClass

    def fields() -> Iterator[tuple[str, str, int, int, int, str | None]]:
        yield "Model", "graph", 7, Field.TYPE_MESSAGE, Field.LABEL_OPTIONAL, ".Graph"
        yield "Graph", "initializer", 5, Field.TYPE_MESSAGE, Field.LABEL_REPEATED, ".Tensor"
        yield "Tensor", "dims", 1, Field.TYPE_INT64, Field.LABEL_REPEATED, None
        yield "Tensor", "data_type", 2, Field.TYPE_INT32, Field.LABEL_OPTIONAL, None
        yield "Tensor", "name", 8, Field.TYPE_STRING, Field.LABEL_OPTIONAL, None
        yield "Tensor", "external_data", 13, Field.TYPE_MESSAGE, Field.LABEL_REPEATED, ".Entry"
        yield "Tensor", "data_location", 14, Field.TYPE_INT32, Field.LABEL_OPTIONAL, None
        yield "Entry", "key", 1, Field.TYPE_STRING, Field.LABEL_OPTIONAL, None
        yield "Entry", "value", 2, Field.TYPE_STRING, Field.LABEL_OPTIONAL, None

    file = FileDescriptorProto(name="external_weights.proto", syntax="proto2")
    messages = {name: file.message_type.add(name=name) for name in ("Model", "Graph", "Tensor", "Entry")}
    for message, name, number, kind, label, type_name in fields():
        messages[message].field.add(name=name, number=number, type=kind, label=label, type_name=type_name)
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("Model"))
