"""Whether this processor sums products of bytes exactly, as products in whole numbers need.

Without VNNI the fast instructions add two products in 16 bits, which saturate. ONNX Runtime has an option for others,
which are as much as five times slower, and takes them on processors too that do not need them. So it is asked for where
a product that would saturate was seen to.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

# ONNX Runtime's option for sums of bytes that do not saturate.
EXACT_SUMS = "session.x64quantprecision"
PRODUCT = b"MatMulIntegerToFloat"
INPUTS, OUTPUTS = 64, 48
# One row, and more than a kernel takes at a time: those may be different kernels.
ROWS = (1, 40)
UINT8, INT8, FLOAT = 2, 3, 1


@cache
def byte_sums_are_exact() -> bool:
    """Return what ONNX Runtime computes here of the largest bytes. It needs `onnxruntime`, and some milliseconds the
    first time.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(product_of_bytes(), options, providers=["CPUExecutionProvider"])
    return all(_is_exact(session, rows) for rows in ROWS)


def _is_exact(session: Any, rows: int) -> bool:
    (found,) = session.run(None, {"rows": np.full((rows, INPUTS), 255, dtype=np.uint8)})
    return bool((found == INPUTS * 255 * 127).all())


def product_of_bytes() -> bytes:
    """Return a graph of rows [M, K] of unsigned bytes times weights [K, N] that are all 127. It is written as the few
    fields of protobuf that it has: the runtime does without `onnx`.
    """
    weights = _number(1, INPUTS) + _number(1, OUTPUTS) + _number(2, INT8) + _text(8, b"weights")
    weights += _text(9, bytes([127]) * (INPUTS * OUTPUTS))
    scale = _number(2, FLOAT) + _text(8, b"scale") + _text(9, np.float32(1).tobytes())
    zero_point = _number(2, UINT8) + _text(8, b"zero_point") + _text(9, bytes([0]))
    node = b"".join(_text(1, name) for name in (b"rows", b"weights", b"scale", b"scale", b"zero_point"))
    node += _text(2, b"product") + _text(4, PRODUCT) + _text(7, b"com.microsoft")
    graph = _text(1, node) + _text(2, b"product_of_bytes")
    graph += b"".join(_text(5, tensor) for tensor in (weights, scale, zero_point))
    graph += _text(11, _value(b"rows", UINT8, INPUTS)) + _text(12, _value(b"product", FLOAT, OUTPUTS))
    opsets = _text(8, _number(2, 21)) + _text(8, _text(1, b"com.microsoft") + _number(2, 1))
    return _number(1, 10) + _text(7, graph) + opsets


def _value(name: bytes, kind: int, columns: int) -> bytes:
    shape = _text(1, _text(2, b"M")) + _text(1, _number(1, columns))
    return _text(1, name) + _text(2, _text(1, _number(1, kind) + _text(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
