"""The numerical check of an exported graph against the PyTorch reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ht_export.model.dims import graph_dims
from ht_export.model.reference import HiddenTransferModel
from ht_export.verify.random_trees import random_chain, random_ends, random_tree
from runtime import bindings
from runtime.bindings import GraphDims
from runtime.engines.dense_cache import KeptRows
from runtime.engines.host_cache import HostCacheEngine, HostResult, KeyValueCache, cache_of, caches_of
from runtime.engines.layout import stack
from runtime.engines.onnxruntime_cpu import OnnxRuntimeCpuEngine
from runtime.engines.protocol import Batch
from runtime.errors import InputError
from runtime.rows import Rows, lay_out

# Tolerance, relative to the largest value of the output compared: float32 sums of a few thousand terms, in another
# order.
TOLERANCE = 1e-4
# Tokens of a prompt, and those of its last pass.
PROMPT_TOKENS, PROMPT_END = 24, 5
# Rows of recorded caches behind the valid ones.
SPARE_ROWS = 8


class ReferenceEngine(HostCacheEngine):
    """The PyTorch reference behind the runtime's engine protocol."""

    max_batch = 8

    def __init__(self, model: HiddenTransferModel) -> None:
        self.model = model
        self.dims = graph_dims(model.base.config, model.transfer)

    @torch.inference_mode()
    def run(self, batch: Batch) -> HostResult:
        """See `Engine.run`."""
        laid_out = stack(batch.rows, batch.lengths, self.dims.join_order)
        inputs = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in laid_out.values.items()}
        keys, values = ([torch.from_numpy(cache) for cache in kind] for kind in caches_of(batch))
        output = self.model(
            inputs[bindings.INPUT_IDS],
            inputs[bindings.POSITION_IDS],
            inputs[bindings.TREE_MASK],
            [inputs[bindings.pseudo_parent(step)] for step in range(1, self.dims.num_steps + 1)],
            inputs[bindings.LOGIT_ROWS],
            inputs[bindings.CACHE_LENGTH],
            keys,
            values,
        )
        return HostResult(
            batch,
            output.logits.numpy(),
            output.draft_logits.numpy(),
            [key.numpy() for key in output.key_new],
            [value.numpy() for value in output.value_new],
            laid_out.pseudo,
        )


class LoweredEngine(HostCacheEngine):
    """The graph lowered for the CPU, over the portable graph's cache and with its outputs."""

    max_batch = 1

    def __init__(self, path: Path, dims: GraphDims, *, small: bool = False) -> None:
        self.dims = dims
        self._engine = OnnxRuntimeCpuEngine(path, dims, small=small)

    def run(self, batch: Batch) -> HostResult:
        """See `Engine.run`."""
        (rows,), (slot,) = batch.rows, batch.slots
        cache, in_place = cache_of(slot), self._engine.new_slot()
        if cache.length:
            kept = np.stack([arrays[:, 0, :, : cache.length] for arrays in (cache.keys, cache.values)])
            self._engine.copy(KeptRows(kept), in_place, cache.length)
        result = self._engine.run(Batch.of([rows], [in_place]))
        keys, values = ([new.copy() for new in kind] for kind in result.new(self.dims))
        logits, draft_logits = result.logits[None], result.draft_logits[None]
        return HostResult(batch, logits, draft_logits, keys, values, result.laid_out.pseudo)


@dataclass(frozen=True)
class Difference:
    """The largest difference of one output in one case, relative to the output's largest value; and `of_norm`, the norm
    of all differences relative to the output's norm.
    """

    case: str
    output: str
    relative: float
    of_norm: float


@dataclass(frozen=True)
class Computed:
    """All that a pass of one request computes: logits [M, V]; draft_logits [sum R_k, V]; key_new and value_new L arrays
    [1, Hkv, R_l, D], none where they are not told.
    """

    logits: NDArray
    draft_logits: NDArray
    key_new: Sequence[NDArray] = ()
    value_new: Sequence[NDArray] = ()

    @classmethod
    def of(cls, result: HostResult) -> Computed:
        """Return what a pass of one request computed."""
        return cls(result.logits[0], result.draft_logits[0], result.key_new, result.value_new)


@dataclass(frozen=True)
class Expected:
    """One pass of the reference: its inputs, the cache as it was, and the outputs."""

    case: str
    rows: Rows
    cache: KeyValueCache
    outputs: Computed
    accepted: Sequence[int]


def record(reference: HostCacheEngine, seed: int = 0, tokens: Sequence[int] = ()) -> list[Expected]:
    """Run the reference over a prompt, `tokens` or random ones, random trees with and without pseudo rows, and a plain
    step.

    Its outputs are kept, so that it need not be in memory together with what it is compared with.
    """
    passes = []
    rng = np.random.default_rng(seed)
    cache = reference.new_slot()
    for case, chained, tree_rows, pseudo_rows in _cases(reference.dims.num_steps, len(tokens) or PROMPT_TOKENS):
        rows = _random_rows(reference.dims, rng, cache.length, tree_rows, pseudo_rows, chained)
        given = tokens[cache.length : cache.length + tree_rows]
        rows.input_ids[: len(given)] = given
        result = reference.run(Batch.of([rows], [cache]))
        accepted = range(tree_rows) if chained else [0]
        passes.append(Expected(case, rows, _as_it_is(cache), Computed.of(result), accepted))
        reference.commit(result, [accepted])
    return passes


def _as_it_is(cache: KeyValueCache) -> KeyValueCache:
    """Return a copy that is no larger than it must be to have rows that are not valid."""
    kept = copy.copy(cache)
    rows = cache.length + SPARE_ROWS
    kept.keys, kept.values = (array[..., :rows, :].copy() for array in (cache.keys, cache.values))
    return kept


def compare(engine: HostCacheEngine, expected: Sequence[Expected]) -> list[Difference]:
    """Run the engine over recorded passes; return all differences."""
    differences = []
    for one in expected:
        found = Computed.of(engine.run(Batch.of([one.rows], [one.cache])))
        pairs = {name: [(getattr(found, name), getattr(one.outputs, name))] for name in ("logits", "draft_logits")}
        for name in ("key_new", "value_new"):
            pairs[name] = list(zip(getattr(found, name), getattr(one.outputs, name), strict=True))
        for name, arrays in pairs.items():
            largest, of_norm = (max(measure(*both) for both in arrays) for measure in (relative, _of_norm))
            differences.append(Difference(one.case, name, largest, of_norm))
    return differences


def difference(engine: HostCacheEngine, expected: Sequence[Expected]) -> float:
    """Return the largest relative difference of any output of a graph with quantised weights.

    Raises `InputError` when it computes something else: no numbers, or less alike than nothing at all.
    """
    found = compare(engine, expected)
    worst = max(found, key=lambda one: one.of_norm)
    if not worst.of_norm < 1.0:
        raise InputError(
            f"with quantised weights the graph does not compute what the PyTorch reference does: {worst.output} "
            f"differs by {worst.of_norm:.2g} of its norm ({worst.case}); nothing was written, use --precision fp32"
        )
    return max(one.relative for one in found)


def check(engine: HostCacheEngine, expected: Sequence[Expected]) -> float:
    """Return the largest relative difference; raise `InputError` naming case and output when it is too large."""
    worst = max(compare(engine, expected), key=lambda difference: difference.relative)
    if not worst.relative <= TOLERANCE:
        raise InputError(
            f"the exported graph does not compute what the PyTorch reference does: {worst.output} differs by "
            f"{worst.relative:.1e} of its largest value ({worst.case}; at most {TOLERANCE:.0e} is allowed). "
            "Nothing was written; please report this with the model's name and the versions of torch and onnxruntime"
        )
    return worst.relative


def _cases(num_steps: int, prompt_tokens: int) -> list[tuple[str, bool, int, tuple[int, ...]]]:
    """Return each case's name, whether it is a chain, its tree rows and its pseudo rows; the cache begins empty."""
    return [
        ("prompt", True, prompt_tokens - PROMPT_END, (0,) * num_steps),
        ("prompt's end", True, PROMPT_END, (1,) * num_steps),
        ("tree", False, 9, tuple(max(1, 6 - 2 * k) for k in range(num_steps))),
        ("tree, first step only", False, 4, (4, *(0,) * (num_steps - 1))),
        ("plain", False, 1, (0,) * num_steps),
    ]


def _random_rows(
    dims: GraphDims, rng: np.random.Generator, start: int, tree_rows: int, pseudo_rows: tuple[int, ...], chained: bool
) -> Rows:
    """Return rows of random tokens: a chain as in a prompt, or a random tree."""
    tree = (random_chain if chained else random_tree)(rng, dims.vocab_size, tree_rows)
    return lay_out(tree, random_ends(rng, tree_rows, pseudo_rows), dims.join_order, start)


def _of_norm(found: np.ndarray, expected: np.ndarray) -> float:
    if not expected.size:
        return 0.0
    of_norm = float(np.linalg.norm(found - expected) / max(1e-6, float(np.linalg.norm(expected))))
    return math.inf if math.isnan(of_norm) else of_norm


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value expected; infinite where there is no number."""
    if not expected.size:
        return 0.0
    found_one = float(np.abs(found - expected).max() / max(1e-6, float(np.abs(expected).max())))
    # `max` would pass over what is not a number.
    return math.inf if math.isnan(found_one) else found_one
