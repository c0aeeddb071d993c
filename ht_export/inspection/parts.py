"""The parts of a graph: which weights and which nodes are the embeddings', the layers', the head's, the drafts'."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from ht_export.graph.domains import DOMAIN

EMBEDDINGS, LAYERS, ATTENTION, HEAD = "embeddings", "layers", "attention", "head"
DRAFT_HEAD, TRANSFER, OTHER = "draft head", "transfer layers", "other"
# In the order of a pass.
PARTS = (EMBEDDINGS, LAYERS, ATTENTION, TRANSFER, HEAD, DRAFT_HEAD, OTHER)

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_STEP = re.compile(r"\btransfer\.maps\.(\d+)\.")
_BITS = {onnx.TensorProto.FLOAT: 32, onnx.TensorProto.FLOAT16: 16, onnx.TensorProto.BFLOAT16: 16,
         onnx.TensorProto.INT64: 64, onnx.TensorProto.INT32: 32, onnx.TensorProto.INT8: 8, onnx.TensorProto.UINT8: 8,
         onnx.TensorProto.BOOL: 8, onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4,
         onnx.TensorProto.FLOAT8E4M3FN: 8}  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A stored weight: its part, the layer or draft step (0-based) where it is of one, bytes, and for a matrix the
    multiplications that it costs each row. `tied` is true for embeddings that are the head too.
    """

    name: str
    part: str
    index: int | None
    bytes: int
    products: int
    tied: bool = False


def weights_of(graph: onnx.GraphProto, precision: str) -> Iterator[Weight]:
    """Yield the weights of `graph`, quantised to `precision` or not."""
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    multiplied = {
        name for node in graph.node if node.op_type in ("MatMul", "Gemm", "Transpose", "Cast") for name in node.input
    }
    for tensor in graph.initializer:
        # Whole numbers of 64 bits are shapes and places, whichever layer they are named after.
        part, index = (OTHER, None) if tensor.data_type == onnx.TensorProto.INT64 else part_of(tensor.name)
        elements = math.prod(tensor.dims)
        # Two whole numbers of four bits are a byte.
        values = elements * (2 if precision == "int4" and tensor.name.endswith(".quantised") else 1)
        tied = part == HEAD and tensor.name in gathered and tensor.name in multiplied
        if part == HEAD and tensor.name in gathered and not tied:
            part = EMBEDDINGS
        is_matrix = (
            len(tensor.dims) >= 2 and part != EMBEDDINGS and not tensor.name.endswith((".scales", ".zero_points"))
        )
        size = -(-elements * _BITS.get(tensor.data_type, 32) // 8)
        yield Weight(tensor.name, part, index, size, values if is_matrix else 0, tied)


def part_of(name: str) -> tuple[str, int | None]:
    """Return the part that a weight of that name is of, with its layer or draft step."""
    if found := _STEP.search(name):
        return TRANSFER, int(found[1])
    if found := _LAYER.search(name):
        return LAYERS, int(found[1])
    if "draft_head" in name:
        return DRAFT_HEAD, None
    if "embed_tokens" in name:
        return EMBEDDINGS, None
    if "lm_head" in name or re.search(r"\bmodel\.norm\.", name):
        return HEAD, None
    return OTHER, None


def parts_of_nodes(graph: onnx.GraphProto) -> dict[str, str]:
    """Return the part of each node of `graph`, by name: that of its weights, or else of what it computes with."""
    made_by: dict[str, str] = {}
    parts = {}
    for node in graph.node:
        owned = [part_of(name)[0] for name in node.input if part_of(name)[0] != OTHER]
        part = owned[0] if owned else next((made_by[name] for name in node.input if name in made_by), OTHER)
        if node.op_type == "Gather" and owned:
            part = EMBEDDINGS
        elif node.domain == DOMAIN or node.op_type in ("If", "GroupQueryAttention", "Attention"):
            part = ATTENTION
        elif part in (ATTENTION, EMBEDDINGS) and not owned:
            part = LAYERS
        parts[node.name] = part
        made_by |= dict.fromkeys(node.output, part)
    return parts


def operators(graph: onnx.GraphProto) -> dict[str, int]:
    """Return how many nodes of each operator `graph` has, the most first."""
    counts = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.node)
    return dict(counts.most_common())
