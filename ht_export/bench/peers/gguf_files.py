"""GGUF files of the same model in another precision: for peers that read them, from one that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ht_export.bench.peers.kinds import BITS4, BITS8, BITS16, FLOAT32
from ht_export.foreign import foreign_code
from ht_export.model.gguf_header import check_header
from ht_export.model.stated import FETCH_AGAIN

# The field that tells of a file's precision, and its values, as llama.cpp numbers them.
FILE_TYPE = "general.file_type"
FILE_TYPES = {FLOAT32: 0, BITS16: 1, BITS8: 7, BITS4: 2}
# Matrices that are kept in 8 bits where others have 4: that of tokens, and the head.
FINER = ("token_embd.weight", "output.weight")


def has_precision(path: Path, precision: str) -> bool:
    """Return whether most weights of the GGUF file at `path` have 4 bits, or all have what `precision` says. Raises
    `InputError` for one that cannot be read.
    """
    import gguf

    check_header(path)
    names = {FLOAT32: ("F32",), BITS16: ("F16",), BITS8: ("Q8_0", "F32"), BITS4: ("Q4_0", "Q4_1", "Q4_K")}[precision]
    with foreign_code(f"cannot read {path}", FETCH_AGAIN):
        matrices = [tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2]
    fitting = sum(int(tensor.n_elements) for tensor in matrices if tensor.tensor_type.name in names)
    total = sum(int(tensor.n_elements) for tensor in matrices)
    return fitting * 2 > total if precision == BITS4 else fitting == total


def convert(source: Path, precision: str, out: Path) -> None:
    """Write the model of the GGUF file `source` to `out`, its matrices in `precision`, all else as it is."""
    import gguf

    check_header(source)
    kinds = gguf.GGMLQuantizationType
    kind = {FLOAT32: kinds.F32, BITS16: kinds.F16, BITS8: kinds.Q8_0, BITS4: kinds.Q4_0}[precision]
    with foreign_code(f"cannot convert {source}", FETCH_AGAIN):
        reader = gguf.GGUFReader(source)
        writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            if not name.startswith("GGUF.") and name not in ("general.architecture", FILE_TYPE):
                inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], inner)
        writer.add_uint32(FILE_TYPE, FILE_TYPES[precision])
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            own = kinds.Q8_0 if kind == kinds.Q4_0 and tensor.name in FINER else kind
            _add(writer, tensor.name, values, own if values.ndim == 2 else kinds.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add(writer: Any, name: str, values: Any, kind: Any) -> None:
    import gguf

    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    elif kind == gguf.GGMLQuantizationType.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_shape=packed.shape, raw_dtype=kind)
