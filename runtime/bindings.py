"""The graph's inputs and outputs: the one place with their names, types and shapes.

Letters: B batch, T tree rows, R = T + sum R_k all rows, R_k pseudo rows of step k, M rows whose logits are wanted,
S capacity of the cache, Hkv key/value heads, D head size, V vocabulary. In the lowered graph P slots, of up to Q rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
TREE_MASK = "tree_mask"
LOGIT_ROWS = "logit_rows"
CACHE_LENGTH = "cache_length"
LOGITS = "logits"
DRAFT_LOGITS = "draft_logits"
# Further inputs of the lowered graph, which takes the rows of several requests one behind the other: the rows of each
# slot, the slot of each row, and its place among that slot's rows.
SLOT_ROWS = "slot_rows"
ROW_SLOTS = "row_slots"
ROW_PLACES = "row_places"
# A lowered graph says that it has them; those of earlier releases take one request.
REQUESTS, PACKED = "requests", "packed"

Dim = int | str
# Types of weights, keys and values.
Dtype = Literal["float32", "float16", "bfloat16"]

# Far above the dimensions of any model, and low enough that no loop over them, and no shape made of them, is a burden:
# files state them.
MOST_LAYERS = 1 << 10
MOST_HEADS = 1 << 10
MOST_HEAD_DIM = 1 << 10
MOST_HIDDEN = 1 << 16
MOST_VOCABULARY = 1 << 21
MOST_STEPS = 16
TransferLayer = Annotated[int, Meta(ge=0, le=MOST_LAYERS)]
Heads = Annotated[int, Meta(ge=1, le=MOST_HEADS)]

# Prefixes of the names of the inputs that are the cache.
CACHE_PREFIXES = ("key_cache_", "value_cache_")

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def join_order(transfer_layers: Sequence[int]) -> tuple[int, ...]:
    """Return the draft steps, 0-based, in the order of their pseudo rows: the earliest transfer layer first, so that
    the rows alive at any layer are a prefix of all rows.
    """
    return tuple(sorted(range(len(transfer_layers)), key=lambda k: (transfer_layers[k], k)))


def pseudo_parent(step: int) -> str:
    """Return the input that names the tree row of each step-`step` pseudo row; steps count from 1."""
    return f"pseudo_parent_{step}"


def key_cache(layer: int) -> str:
    """Return the input with the cached keys of `layer`."""
    return f"key_cache_{layer}"


def value_cache(layer: int) -> str:
    """Return the input with the cached values of `layer`."""
    return f"value_cache_{layer}"


def key_new(layer: int) -> str:
    """Return the output with the new keys of `layer`."""
    return f"key_new_{layer}"


def value_new(layer: int) -> str:
    """Return the output with the new values of `layer`."""
    return f"value_new_{layer}"


def key_cache_out(layer: int) -> str:
    """Return the output of a lowered graph that is the keys of `layer`, cached and new."""
    return f"key_cache_out_{layer}"


def value_cache_out(layer: int) -> str:
    """Return the output of a lowered graph that is the values of `layer`, cached and new."""
    return f"value_cache_out_{layer}"


@dataclass(frozen=True)
class Binding:
    """One input or output: `shape` has ints for fixed dimensions and letters, or sums of them, for dynamic ones."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def sizes(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with `values` for the letters."""
        return tuple(d if isinstance(d, int) else sum(values[part] for part in d.split(" + ")) for d in self.shape)


def dynamic_dims(
    tree_rows: int, pseudo_rows: Sequence[int], logit_rows: int, capacity: int, batch: int = 1
) -> dict[str, int]:
    """Return the value of each letter for a pass of these sizes."""
    rows = tree_rows + sum(pseudo_rows)
    pseudo = {f"R_{k}": count for k, count in enumerate(pseudo_rows, start=1)}
    return {"B": batch, "T": tree_rows, "R": rows, "M": logit_rows, "S": capacity, **pseudo}


@dataclass(frozen=True)
class GraphDims:
    """The fixed dimensions of a graph. `transfer_layers` holds t_1..t_K, each of 0..num_layers, or raises `ValueError`.

    `dtype` ("float32", "float16" or "bfloat16") is that of weights, keys and values. Logits are float32 always.
    """

    num_layers: Annotated[int, Meta(ge=1, le=MOST_LAYERS)]
    query_heads: Heads
    key_value_heads: Heads
    head_dim: Annotated[int, Meta(ge=1, le=MOST_HEAD_DIM)]
    hidden_size: Annotated[int, Meta(ge=1, le=MOST_HIDDEN)]
    vocab_size: Annotated[int, Meta(ge=1, le=MOST_VOCABULARY)]
    transfer_layers: Annotated[tuple[TransferLayer, ...], Meta(min_length=1, max_length=MOST_STEPS)]
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        for layer in self.transfer_layers:
            if layer > self.num_layers:
                raise ValueError(f"transfer layer {layer} does not exist in a model of {self.num_layers} layers")

    @property
    def num_steps(self) -> int:
        """K, the number of draft steps."""
        return len(self.transfer_layers)

    @property
    def join_order(self) -> tuple[int, ...]:
        """The steps, 0-based, in the order of their rows; see `join_order`."""
        return join_order(self.transfer_layers)

    @property
    def row_bytes(self) -> int:
        """The bytes of the keys and values of one row, of all layers."""
        return 2 * self.num_layers * self.key_value_heads * self.head_dim * BYTES[self.dtype]

    def inputs(self) -> list[Binding]:
        """Return the graph's inputs, in order."""
        cache: tuple[Dim, ...] = ("B", self.key_value_heads, "S", self.head_dim)
        return [
            Binding(INPUT_IDS, "int64", ("B", "T")),
            Binding(POSITION_IDS, "int64", ("B", "R")),
            Binding(TREE_MASK, "bool", ("B", "R", "R")),
            *(Binding(pseudo_parent(k), "int64", ("B", f"R_{k}")) for k in range(1, self.num_steps + 1)),
            Binding(LOGIT_ROWS, "int64", ("B", "M")),
            Binding(CACHE_LENGTH, "int64", ("B",)),
            *(Binding(key_cache(layer), self.dtype, cache) for layer in range(self.num_layers)),
            *(Binding(value_cache(layer), self.dtype, cache) for layer in range(self.num_layers)),
        ]

    def outputs(self) -> list[Binding]:
        """Return the graph's outputs, in order."""

        def new(layer: int) -> tuple[Dim, ...]:
            return ("B", self.key_value_heads, self.rows_alive(layer), self.head_dim)

        return [
            Binding(LOGITS, "float32", ("B", "M", self.vocab_size)),
            Binding(DRAFT_LOGITS, "float32", ("B", self.pseudo_rows(), self.vocab_size)),
            *(Binding(key_new(layer), self.dtype, new(layer)) for layer in range(self.num_layers)),
            *(Binding(value_new(layer), self.dtype, new(layer)) for layer in range(self.num_layers)),
        ]

    def lowered_inputs(self) -> list[Binding]:
        """Return the inputs, in order, of the graph lowered for the CPU, whose cache has P slots.

        With one row of each request they are stacked, B = P. Otherwise B = 1 and the rows of all requests are one
        behind the other, sorted as those of one request are: all tree rows, then the pseudo rows of each step. The rows
        of slot p are slot_rows[p], ascending, with -1 behind the last; row r is number row_places[r] of slot
        row_slots[r]. Where rows are stacked, or of one request, all three have no meaning. Two requests with trees of 2
        and 1 rows, of which the second has a pseudo row:

            rows        a0  a1  b0  b0'       slot_rows   0  1
            row_slots    0   0   1   1                    2  3
            row_places   0   1   0   1
        """
        slots = {CACHE_LENGTH: ("P",)}
        cache: tuple[Dim, ...] = ("P", self.key_value_heads, "S", self.head_dim)
        return [
            *(
                Binding(
                    one.name,
                    one.dtype,
                    cache if one.name.startswith(CACHE_PREFIXES) else slots.get(one.name, one.shape),
                )
                for one in self.inputs()
            ),
            Binding(SLOT_ROWS, "int64", ("P", "Q")),
            Binding(ROW_SLOTS, "int64", ("N",)),
            Binding(ROW_PLACES, "int64", ("N",)),
        ]

    def lowered_outputs(self) -> list[Binding]:
        """Return the outputs, in order, of the graph lowered for the CPU: caches in the place of new keys and values,
        the new rows behind the `cache_length` valid ones.
        """
        cache: tuple[Dim, ...] = ("P", self.key_value_heads, "S", self.head_dim)
        return [
            *self.outputs()[:2],
            *(Binding(key_cache_out(layer), self.dtype, cache) for layer in range(self.num_layers)),
            *(Binding(value_cache_out(layer), self.dtype, cache) for layer in range(self.num_layers)),
        ]

    def rows_alive(self, layer: int) -> str:
        """Return R_l, the rows that pass `layer`, as an expression of T and the R_k."""
        return " + ".join(["T", *(f"R_{k + 1}" for k in self.join_order if self.transfer_layers[k] <= layer)])

    def pseudo_rows(self) -> str:
        """Return sum R_k as an expression, in row order."""
        return " + ".join(f"R_{k + 1}" for k in self.join_order)
