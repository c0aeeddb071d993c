"""Damage to binary formats by somebody who knows their headers."""

from __future__ import annotations

import ast
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from tests.hostile.damage import WHOLE_NUMBERS, damaged, damaged_value, drawn, encode_json

SIZES = (
    "0",
    "1",
    "2",
    "-1",
    "3",
    "4",
    "531",
    "10000000000",
    str(2**31),
    str(2**63),
    str(2**64),
    "1" * 50,
    "",
    "1.0",
    "x",
    "True",
)
DESCRIPTIONS = (
    "'<f2'",
    "'<f4'",
    "'>f2'",
    "'<f8'",
    "'|O'",
    "'<U9'",
    "'<f2,<f2'",
    "[('a', '<f2')]",
    "'|V2'",
    "None",
    "'<f0'",
)


@drawn
def damaged_npy(draw: st.DrawFn, sample: bytes) -> bytes:
    """A file of NumPy: its header made anew with fields that cannot be, its values replaced, or all damaged."""
    if not draw(st.integers(0, 3)):
        return draw(damaged(sample, range(80)))
    length = int.from_bytes(sample[8:10], "little")
    header, body = ast.literal_eval(sample[10 : 10 + length].decode()), sample[10 + length :]
    shape = [str(size) for size in header["shape"]]
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(shape)))
        shape[place : place + draw(st.integers(0, 1))] = [draw(st.sampled_from(SIZES))]
    fields = {
        "'descr'": draw(st.sampled_from((f"'{header['descr']}'", *DESCRIPTIONS))),
        "'fortran_order'": draw(st.sampled_from(("False", "False", "False", "True", "0", "None"))),
        "'shape'": draw(st.sampled_from((f"({', '.join(shape)}, )", f"({', '.join(shape)})", "()", "None", "(" * 200))),
    }
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=1)):
        del fields[name]
    text = "{" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + ", }"
    text = draw(st.sampled_from((text, text, text + " " * 60000, "(" + text, text[:-1], "__import__('os').abort()")))
    stated = draw(st.sampled_from((len(text) + 1, len(text) + 1, len(text), 0, 65535)))
    version = draw(st.sampled_from((b"\x01\x00", b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00")))
    values = draw(
        st.sampled_from((body, body, body[:-1], body + body, b"", b"\x00\x7c" * (len(body) // 2), bytes(len(body))))
    )
    return b"\x93NUMPY" + version + min(stated, 65535).to_bytes(2, "little") + text.encode() + b"\n" + values


@drawn
def damaged_safetensors(draw: st.DrawFn, sample: bytes, nested: str | None = None) -> bytes:
    """A safetensors file: header damaged as JSON, also the JSON in its metadata named `nested`, or a length that is
    another, or values that are no numbers.
    """
    length = int.from_bytes(sample[:8], "little")
    header, body = json.loads(sample[8 : 8 + length]), sample[8 + length :]
    what = draw(st.sampled_from(("bytes", "header", "header", "nested", "nested", "nested", "length", "values")))
    if what == "bytes":
        return draw(damaged(sample, range(16)))
    if what == "nested" and nested is not None:
        inner = draw(damaged_value(json.loads(header["__metadata__"][nested])))
        header["__metadata__"][nested] = encode_json(inner).decode("latin-1")
        content = json.dumps(header).encode()
    elif what in ("header", "nested"):
        names = sorted({name for name in header if name != "__metadata__"})
        content = encode_json(draw(damaged_value(header, [header[name] for name in names[:4]])))
    else:
        content = json.dumps(header).encode()
    stated = len(content)
    if what == "length":
        stated = draw(st.sampled_from((*WHOLE_NUMBERS, stated - 1, stated + 1, stated + len(body), stated + 100)))
    if what == "values":
        start = draw(st.integers(0, max(0, len(body) - 1)))
        body = body[:start] + draw(st.sampled_from((b"\x7f", b"\xff", b"\x00"))) * (len(body) - start)
    return stated.to_bytes(8, "little") + content + body


@drawn
def damaged_kernels(draw: st.DrawFn, sample: bytes) -> bytes:
    """Kernels of a plan: an index that is damaged, compressed as it should be, or more than there should be."""
    size = struct.calcsize("<4sII")
    magic, version, length = struct.unpack_from("<4sII", sample)
    content = zlib.decompress(sample[size:])
    what = draw(st.sampled_from(("bytes", "index", "index", "index", "length", "bomb", "rest")))
    if what == "bytes":
        return draw(damaged(sample, range(16)))
    index, cubins = content[:length], content[length:]
    if what == "index":
        index = encode_json(draw(damaged_value(json.loads(index))))
        length = len(index)
    if what == "length":
        length = draw(
            st.sampled_from((*(number for number in WHOLE_NUMBERS if number < 2**32), length - 1, length + 1))
        )
    stream = zlib.compressobj(level=1)
    parts = [struct.pack("<4sII", magic, version, length), stream.compress(index + cubins)]
    if what == "bomb":
        # Part by part: it is not to take memory here.
        parts += [stream.compress(bytes(1 << 20)) for _ in range(draw(st.sampled_from((1, 500))))]
    return b"".join([*parts, stream.flush(), b"x" if what == "rest" else b""])


@dataclass(frozen=True)
class Field:
    """A field of a protobuf message: number, wire type, and its value, of which bytes may be a message."""

    number: int
    wire: int
    value: int | bytes


# Wire types of protobuf.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LARGEST_VARINT = (1 << 64) - 1


def fields_of(message: bytes) -> list[Field] | None:
    """Return the fields of a protobuf message, None where it cannot be one."""
    found = []
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        value: int | bytes
        if wire == VARINT:
            value, place = _varint(message, place)
        elif wire in (FIXED32, FIXED64):
            width = 4 if wire == FIXED32 else 8
            value, place = int.from_bytes(message[place : place + width], "little"), place + width
        elif wire == BYTES:
            length, place = _varint(message, place)
            value, place = message[place : place + length], place + length
        else:
            return None
        if number == 0 or place > len(message):
            return None
        found.append(Field(number, wire, value))
    return found


def encode_fields(fields: Sequence[Field]) -> bytes:
    """Return a protobuf message."""
    parts = []
    for field in fields:
        parts.append(_encoded(field.number << 3 | field.wire))
        if isinstance(field.value, bytes):
            parts += [_encoded(len(field.value)), field.value]
        elif field.wire == VARINT:
            parts.append(_encoded(field.value))
        else:
            parts.append(field.value.to_bytes(4 if field.wire == FIXED32 else 8, "little"))
    return b"".join(parts)


@drawn
def damaged_protobuf(draw: st.DrawFn, sample: bytes) -> bytes:
    """A protobuf message, of any kind: one to three fields of it, or of messages in it, are changed."""
    if not draw(st.integers(0, 4)):
        return draw(damaged(sample))
    found = sample
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        found = _changed(draw, found)
    return found


def _changed(draw: st.DrawFn, message: bytes) -> bytes:
    fields = fields_of(message)
    if not fields:
        return draw(damaged(message))
    # As often a field of each number: weights are few and nodes are many.
    number = draw(st.sampled_from(sorted({field.number for field in fields})))
    index = draw(st.sampled_from([i for i, field in enumerate(fields) if field.number == number]))
    field = fields[index]
    what = draw(st.sampled_from(("value",) * 12 + ("remove", "repeat", "number", "move")))
    if what == "remove":
        del fields[index]
    elif what == "repeat":
        fields.insert(index, field)
    elif what == "number":
        fields[index] = Field(draw(st.integers(1, 20)), field.wire, field.value)
    elif what == "move":
        fields.insert(draw(st.integers(0, len(fields))), fields.pop(index))
    else:
        fields[index] = Field(field.number, field.wire, _other_value(draw, field))
    return encode_fields(fields)


def _other_value(draw: st.DrawFn, field: Field) -> int | bytes:
    if isinstance(field.value, int):
        width = {VARINT: 64, FIXED64: 64, FIXED32: 32}[field.wire]
        near = (field.value + 1, field.value - 1, 2 * field.value)
        return draw(st.sampled_from((*WHOLE_NUMBERS, *near))) % (1 << width)
    if fields_of(field.value) and draw(st.integers(0, 9)):
        return _changed(draw, field.value)
    if field.value.isascii() and draw(st.integers(0, 1)):
        # Names, mostly.
        return draw(
            st.sampled_from((b"", b"x", b"../x", b"/etc/passwd", b"\xff", b"-1", b"9" * 30, b"input_ids", b"Loop"))
        )
    return draw(damaged(field.value))


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value & LARGEST_VARINT, place
    # Beyond the end: no message.
    return 0, len(message) + 1


def _encoded(value: int) -> bytes:
    return bytes(_bytes_of(value))


def _bytes_of(value: int) -> Iterator[int]:
    while value > 127:
        yield value & 127 | 128
        value >>= 7
    yield value
