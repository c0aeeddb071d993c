"""Limits of a plan, checked, and the optimisation profiles that they make."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.bindings import GraphDims, dynamic_dims
from runtime.bundle.engine_file import MOST_BATCH, MOST_CHUNK, MOST_CONTEXT, MOST_PASS_ROWS, Limits
from runtime.engines.device_cache import in_places
from runtime.errors import InputError
from runtime.tree import TreeSizes

# Tokens in the cache that profiles are tuned for, where the limits allow it.
TYPICAL_CONTEXT = 512


def check_limits(limits: Limits, tree: TreeSizes, model_context: int) -> None:
    """Raise `InputError` when the limits contradict each other, the tree or the model."""
    # Of tree and pseudo rows together a pass has a multiple of `--max-rows`.
    most_rows = MOST_PASS_ROWS // (1 + len(tree.pseudo_rows))
    for flag, value, most in (
        ("--max-batch", limits.max_batch, MOST_BATCH),
        ("--max-context", limits.max_context, MOST_CONTEXT),
        ("--max-rows", limits.max_rows, most_rows),
        ("--chunk", limits.chunk, MOST_CHUNK),
    ):
        if value < 1:
            raise InputError(f"{flag} must be at least 1, not {value}")
        if value > most:
            raise InputError(f"{flag} must be at most {most}, not {value}")
    if limits.max_context > model_context:
        raise InputError(
            f"--max-context {limits.max_context}: the model's own context is {model_context} tokens; give at most that"
        )
    if limits.max_context < tree.tree_rows:
        raise InputError(
            f"--max-context {limits.max_context} is less than the default tree's {tree.tree_rows} rows; raise it, or "
            "give fewer --tree-rows"
        )
    if limits.max_rows < tree.tree_rows:
        raise InputError(
            f"--max-rows {limits.max_rows} is less than the default tree's {tree.tree_rows} rows; raise it, or give "
            "fewer --tree-rows"
        )
    for flag, value in (("--max-rows", limits.max_rows), ("--chunk", limits.chunk)):
        if value > limits.max_context:
            raise InputError(f"{flag} {value} is more than --max-context {limits.max_context}; lower it")


Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: for each input its least, typical and largest shape."""

    name: str
    shapes: dict[str, Range]


def profiles(dims: GraphDims, limits: Limits, tree: TreeSizes) -> tuple[Profile, Profile]:
    """Return the profiles of verification and of prompt chunks."""
    typical = min(TYPICAL_CONTEXT, limits.max_context)
    nothing, one = (0,) * dims.num_steps, (1,) * dims.num_steps
    most, batch, capacity = (limits.max_rows,) * dims.num_steps, limits.max_batch, limits.capacity
    together = typical_batch(batch)
    verification = (
        dynamic_dims(1, nothing, 1, 0),
        dynamic_dims(tree.tree_rows, tree.pseudo_rows, tree.tree_rows, typical, together),
        dynamic_dims(limits.max_rows, most, limits.max_rows, capacity, batch),
    )
    # Of prompts there is one in a pass, whatever else runs.
    prompt = (
        dynamic_dims(1, nothing, 1, 0),
        dynamic_dims(limits.chunk, one, 1, typical),
        dynamic_dims(limits.chunk, one, 1, capacity, batch),
    )
    return Profile("verification", _shapes(dims, verification)), Profile("prompt", _shapes(dims, prompt))


def _shapes(dims: GraphDims, values: tuple[dict[str, int], ...]) -> dict[str, Range]:
    least, typical, most = values
    return {
        binding.name: (binding.sizes(least), binding.sizes(typical), binding.sizes(most)) for binding in dims.inputs()
    }


def typical_batch(max_batch: int) -> int:
    """Return the requests that verification is tuned for: half of the most, in places as passes have them.

    With few requests a pass is bound by reading the weights, whatever it was tuned for; with many its arithmetic
    counts, and as many as there may be are rare. A plan of one request is tuned for that.
    """
    return in_places(-(-max_batch // 2), max_batch)


def cache_bytes(dims: GraphDims, limits: Limits) -> int:
    """Return the bytes of the keys and values of as many requests as there may be, each of the longest context."""
    return limits.max_batch * limits.capacity * dims.row_bytes
