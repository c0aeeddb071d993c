"""Commits of the accepted rows of many requests at once: the compiled kernel against what it must do."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ht_export.bench.gpu.parts import note


@dataclass(frozen=True)
class CommitCase:
    """One commit: N arrays `new` [B, Hkv, R_l, D] and their `caches` [P, Hkv, S, D], of 16 bits; for each of the B
    requests the valid rows (`lengths`) and the `accepted` ones. They are in places from `first` on.
    """

    new: list[Any]
    caches: list[Any]
    lengths: list[int]
    accepted: list[list[int]]
    first: int


def make_commit(rng: random.Random, device: str) -> CommitCase:
    """Return a random commit, in which some requests may accept nothing, and one accepts some row."""
    import torch

    batch, heads, head_dim = rng.choice((1, 2, 5, 16)), rng.choice((1, 3, 8)), rng.choice((16, 64, 128))
    tree, arrays = rng.choice((1, 4, 16, 256)), rng.choice((2, 60))
    accepted = [sorted(rng.sample(range(tree), rng.randint(0, tree))) for _ in range(batch)]
    accepted[rng.randrange(batch)] = list(range(tree))
    lengths = [rng.randint(0, 300) for _ in range(batch)]
    capacity, first, behind = max(lengths) + tree, rng.randint(0, 2), rng.randint(0, 2)

    def numbers(*shape: int) -> Any:
        return torch.randint(-30000, 30000, shape, dtype=torch.int16, device=device)

    new = [numbers(batch, heads, tree + rng.choice((0, 7)), head_dim) for _ in range(arrays)]
    caches = [numbers(first + batch + behind, heads, capacity, head_dim) for _ in range(arrays)]
    return CommitCase(new, caches, lengths, accepted, first)


def committed(case: CommitCase) -> list[Any]:
    """Return the caches as they must be after the commit."""
    found = [cache.clone() for cache in case.caches]
    for source, cache in zip(case.new, found, strict=True):
        for request, (length, rows) in enumerate(zip(case.lengths, case.accepted, strict=True)):
            cache[case.first + request, :, length : length + len(rows)] = source[request][:, rows]
    return found


def check_commits(commit: Callable[[CommitCase], None], count: int, seed: int, device: str = "cuda") -> dict[str, Any]:
    """Do `count` random commits by `commit`, which changes the caches; return how many are wrong."""
    import torch

    rng = random.Random(seed)
    torch.manual_seed(seed)
    wrong = []
    for number in range(count):
        case = make_commit(rng, device)
        expected = committed(case)
        commit(case)
        if not all(map(torch.equal, case.caches, expected)):
            wrong.append(number)
    faults = [f"{len(wrong)} of {count} commits are wrong, the first number {wrong[0]}"] if wrong else []
    return {"cases": count, "wrong": len(wrong), "faults": faults}


class CompiledCommit:
    """The kernel that commits, compiled for this machine's GPU and launched through the driver as plans launch it."""

    def __init__(self) -> None:
        self._launchers: dict[int, Any] = {}

    def __call__(self, case: CommitCase) -> None:
        """Commit, and wait until that is done."""
        import torch

        from plugins.launch import Commit

        device = case.new[0].device
        most = max(map(len, case.accepted))
        batch, heads, _, head_dim = case.new[0].shape

        def on_device(values: Any, dtype: Any) -> Any:
            return torch.tensor(values, dtype=dtype, device=device)

        # What lies behind a request's own accepted rows is no row at all.
        padded = [rows + [1 << 30] * (most - len(rows)) for rows in case.accepted]
        sources, targets = (
            on_device([tensor.data_ptr() for tensor in tensors], torch.int64) for tensors in (case.new, case.caches)
        )
        source_rows = on_device([tensor.shape[2] for tensor in case.new], torch.int32)
        lengths, accepted = on_device(case.lengths, torch.int64), on_device(padded, torch.int32)
        counts = on_device(list(map(len, case.accepted)), torch.int32)
        launch = Commit(
            sources.data_ptr(),
            targets.data_ptr(),
            source_rows.data_ptr(),
            lengths.data_ptr(),
            accepted.data_ptr(),
            counts.data_ptr(),
            arrays=len(case.new),
            batch=batch,
            kv_heads=heads,
            first=case.first,
            most=most,
            capacity=case.caches[0].shape[2],
        )
        self._launcher(head_dim)(launch, torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()

    def _launcher(self, head_dim: int) -> Any:
        import torch

        from plugins.binaries import COMMIT_ARCHITECTURES, best_architecture
        from plugins.compile import compile_commit
        from plugins.launch import CommitLauncher

        if head_dim not in self._launchers:
            note(f"compiling the kernel that commits, head size {head_dim}")
            sm = best_architecture(*torch.cuda.get_device_capability(), COMMIT_ARCHITECTURES)
            assert sm is not None
            self._launchers[head_dim] = CommitLauncher(compile_commit("float16", head_dim, [sm]))
        return self._launchers[head_dim]
