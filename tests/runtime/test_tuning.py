from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import EngineFileError, Generator
from runtime.bindings import GraphDims
from runtime.bundle.tuning_file import Tuning, read_tuning, tuning_path, write_tuning
from runtime.drafting.sizing import Menu
from runtime.engines.protocol import Batch, Freshness, Kept, Result, Slot
from runtime.errors import InputError
from runtime.rows import HostOutputs, Rows
from runtime.tree import TreeSizes
from runtime.tuning import QUICK_CONTEXTS, QUICK_REPEATS, QUICK_SECONDS, cpu_name, measure, menu_sizes, quick

DIMS = GraphDims(1, 1, 1, 1, 1, 11, (0, 0, 0))
PLAIN = TreeSizes.plain(3)


class Clock:
    """A clock that stands still but for what the engine takes."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("runtime.tuning.time", clock)
    return clock


@dataclass
class TimedSlot:
    length: int = 0


@dataclass(frozen=True)
class TimedResult:
    """Holds until the engine's next pass."""

    batch: Batch
    logits: NDArray[np.float32]
    draft_logits: NDArray[np.float32]
    number: int
    freshness: Freshness

    def outputs(self, index: int) -> HostOutputs:
        self.freshness.check(self.number)
        return HostOutputs(self.batch.rows[index], self.logits, self.draft_logits)


@dataclass
class TimedEngine:
    """An engine that does nothing in the time of `seconds`, of the rows of a pass and those cached.

    As on a GPU, a new slot takes the place of the one before.
    """

    clock: Clock
    seconds: Callable[[Rows, int], float]
    dims: GraphDims = DIMS
    max_batch: int = 1
    max_slots: int = 1
    packs: bool = False
    row_bytes: int = 8
    gpu_name: str | None = None
    freshness: Freshness = field(default_factory=Freshness)
    passes: list[tuple[TreeSizes, int]] = field(default_factory=list)
    newest: TimedSlot | None = None

    def new_slot(self) -> TimedSlot:
        self.newest = TimedSlot()
        return self.newest

    def keep(self, slot: Slot, rows: int) -> Kept:
        raise AssertionError("nothing is kept")

    def copy(self, source: Slot | Kept, target: Slot, rows: int) -> None:
        raise AssertionError("nothing is copied")

    def release(self, slot: Slot) -> None:
        raise AssertionError("a slot goes when nothing refers to it")

    def run(self, batch: Batch) -> TimedResult:
        (rows,), (slot,) = batch.rows, batch.slots
        assert slot is self.newest
        assert rows.position_ids.min(initial=99999) >= slot.length
        self.passes.append((TreeSizes(len(rows.input_ids), rows.counts), slot.length))
        self.clock.now += self.seconds(rows, slot.length)
        rng = np.random.default_rng(0)
        logits, draft_logits = (
            rng.standard_normal((count, 11), dtype=np.float32) for count in (len(rows.logit_rows), sum(rows.counts))
        )
        return TimedResult(batch, logits, draft_logits, self.freshness.next_pass(), self.freshness)

    def commit(self, result: Result, accepted: Sequence[Sequence[int]]) -> None:
        assert isinstance(result, TimedResult)
        self.freshness.commit(result.number)
        for slot, rows in zip(result.batch.slots, accepted, strict=True):
            assert isinstance(slot, TimedSlot)
            slot.length += len(rows)


def by_rows(plain: float, row: float = 0.1) -> Callable[[Rows, int], float]:
    """Times that grow with the rows of a pass, by a share of those of a plain pass."""
    return lambda rows, length: plain * (1 + row * (len(rows.position_ids) - 1))


@pytest.mark.parametrize(
    "default",
    [
        TreeSizes(4, (4, 2, 2)),
        TreeSizes(16, (16, 16, 16)),
        TreeSizes(6, (6, 4, 2)),
        TreeSizes(5, (3,)),
        TreeSizes(4, (4, 0, 0)),
        TreeSizes(4, (0, 0, 0)),
        TreeSizes(1, (1, 1, 1)),
        TreeSizes(150, (150, 70, 1)),
    ],
    ids=str,
)
def test_a_menu_has_plain_decoding_the_engines_own_sizes_and_others_within_three_times_these(
    default: TreeSizes,
) -> None:
    sizes = menu_sizes(default)
    steps = len(default.pseudo_rows)
    assert sizes[:2] == (TreeSizes.plain(steps), default)
    assert len(set(sizes)) == len(sizes)
    for one in sizes:
        assert 1 <= one.tree_rows <= 3 * default.tree_rows
        assert len(one.pseudo_rows) == steps
        for rows, own in zip(one.pseudo_rows, default.pseudo_rows, strict=True):
            assert 0 <= rows <= 3 * own
    # Drafts can be tried on the certain token alone, and their trees verified without more.
    assert TreeSizes(1, tuple(min(1, own) for own in default.pseudo_rows)) in sizes
    assert TreeSizes(2, (0,) * steps) in sizes


def test_late_draft_steps_can_be_left_out() -> None:
    sizes = menu_sizes(TreeSizes(4, (4, 2, 2, 2)))
    for late in (0, 2):
        assert {TreeSizes(6, (2, 2, 2, late)), TreeSizes(8, (8, 4, 4, 2 * late))} <= set(sizes)


@pytest.mark.parametrize("context", [0, 1, 100, 300])
def test_passes_are_timed_at_the_context_asked_for(clock: Clock, context: int) -> None:
    engine = TimedEngine(clock, lambda rows, length: 0.01 * len(rows.position_ids) + 1e-5 * length)
    sizes = menu_sizes(TreeSizes(4, (4, 2, 2)))
    menu = measure(engine, sizes, [context, 500], 3)
    assert menu.sizes == sizes
    assert menu.contexts == (context, 500)
    expected = [
        [0.01 * (one.tree_rows + sum(one.pseudo_rows)) + 1e-5 * length for one in sizes] for length in (context, 500)
    ]
    np.testing.assert_allclose(menu.seconds, expected)


def test_what_disturbs_a_pass_does_not_count(clock: Clock) -> None:
    # The first pass of a shape sets it up, and now and then another process has the machine.
    seen: set[TreeSizes] = set()
    rng = np.random.default_rng(0)

    def seconds(rows: Rows, length: int) -> float:
        shape = TreeSizes(len(rows.input_ids), tuple(len(parents) for parents in rows.pseudo_parents))
        first = shape not in seen
        seen.add(shape)
        return 0.01 * len(rows.position_ids) * (50 if first else 3 if rng.random() < 0.2 else 1)

    menu = measure(TimedEngine(clock, seconds), menu_sizes(TreeSizes(4, (4, 2, 2))), [64], 8)
    rows = [one.tree_rows + sum(one.pseudo_rows) for one in menu.sizes]
    np.testing.assert_allclose(menu.seconds[0], 0.01 * np.array(rows))


def test_progress_ends_at_all_there_is_to_do(clock: Clock) -> None:
    told: list[tuple[int, int]] = []
    engine = TimedEngine(clock, by_rows(0.01))
    measure(engine, menu_sizes(TreeSizes(2, (2, 1, 1))), [0, 64], 3, progress=lambda *parts: told.append(parts))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len({total for _, total in told}) == 1
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("plain", [1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("row", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("default", [TreeSizes(4, (4, 2, 2)), TreeSizes(16, (16, 16, 16))], ids=str)
def test_a_quick_measurement_is_over_in_time_however_slow_the_engine(
    clock: Clock, plain: float, row: float, default: TreeSizes
) -> None:
    engine = TimedEngine(clock, by_rows(plain, row))
    start = clock.now
    tuning = quick(engine, default, 8192, "cpu", "hash")
    # At the least a pass that fills the cache, and two of each of two sizes.
    least = plain * (1 + 63 * row) + 2 * plain * (2 + row * (default.tree_rows + sum(default.pseudo_rows)))
    assert clock.now - start < 1.2 * QUICK_SECONDS + least
    menu = tuning.menu
    assert menu.sizes == menu_sizes(default)[: len(menu.sizes)]
    assert len(menu.sizes) >= 2
    assert menu.seconds.shape == (len(menu.contexts), len(menu.sizes))
    assert list(menu.contexts) == sorted(set(menu.contexts))
    if plain <= 1e-3:
        assert menu.contexts == QUICK_CONTEXTS
        assert menu.sizes == menu_sizes(default)
        assert len(engine.passes) > 2 * QUICK_REPEATS * len(menu.sizes)
    expected = [[plain * (1 + row * (one.tree_rows + sum(one.pseudo_rows) - 1)) for one in menu.sizes]]
    np.testing.assert_allclose(menu.seconds, expected * len(menu.contexts), rtol=1e-2)


@pytest.mark.parametrize("max_context", [1, 16, 40, 128, 140, 161, 1000, 2000])
@pytest.mark.parametrize("default", [TreeSizes(4, (4, 2, 2)), TreeSizes(16, (16, 16, 16))], ids=str)
def test_small_context_limits_are_kept_to(clock: Clock, max_context: int, default: TreeSizes) -> None:
    engine = TimedEngine(clock, by_rows(1e-4))
    menu = quick(engine, default, max_context, "cpu", "hash").menu
    assert 1 <= len(menu.contexts) <= 2
    assert list(menu.contexts) == sorted(set(menu.contexts))
    assert min(menu.contexts) >= 0
    if max_context > 3 * default.tree_rows:
        assert all(length + sizes.tree_rows <= max_context for sizes, length in engine.passes)


def tuning_of(device: str = "cpu, 2 threads", sha256: str = "abc", **changes: Any) -> Tuning:
    menu = Menu((PLAIN, TreeSizes(4, (4, 2, 2))), (128, 1024), np.array([[0.01, 0.02], [0.0125, 0.03]]))
    return replace(Tuning(device, sha256, menu, 1.5, 0.25, "full", {"repeats": 4}), **changes)


def assert_same(found: Tuning | None, expected: Tuning) -> None:
    assert found is not None
    assert [one.requests for one in found.batches] == [one.requests for one in expected.batches]
    for own, other in zip(found.batches, expected.batches, strict=True):
        assert (own.menu.sizes, own.menu.contexts) == (other.menu.sizes, other.menu.contexts)
        np.testing.assert_allclose(own.menu.seconds, other.menu.seconds, rtol=1e-2)
    assert replace(found, menu=expected.menu, batches=expected.batches) == expected
    assert (found.menu.sizes, found.menu.contexts) == (expected.menu.sizes, expected.menu.contexts)
    np.testing.assert_allclose(found.menu.seconds, expected.menu.seconds, atol=1e-7)


def read(engine: Path, device: str = "cpu, 2 threads", sha256: str = "abc") -> Tuning | None:
    return read_tuning(engine, sha256, device, DIMS)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return tmp_path / "engine.onnx"


def test_a_tuning_comes_back_from_its_file(engine: Path) -> None:
    assert read(engine) is None
    write_tuning(engine, tuning_of())
    assert_same(read(engine), tuning_of())
    assert [path.name for path in engine.parent.iterdir()] == ["engine.tuning.json"]


def test_each_device_has_a_tuning_and_the_last_one_counts(engine: Path) -> None:
    write_tuning(engine, tuning_of())
    write_tuning(engine, tuning_of("cpu, 4 threads", rate=2.0))
    write_tuning(engine, tuning_of(draft_value=0.75))
    assert_same(read(engine), tuning_of(draft_value=0.75))
    assert_same(read(engine, "cpu, 4 threads"), tuning_of("cpu, 4 threads", rate=2.0))
    assert read(engine, "cpu, 8 threads") is None
    assert len(json.loads(tuning_path(engine).read_text())["tunings"]) == 2


def test_tunings_of_another_engine_do_not_count_and_are_dropped(engine: Path) -> None:
    write_tuning(engine, tuning_of(sha256="before"))
    write_tuning(engine, tuning_of("cpu, 4 threads", sha256="before"))
    assert read(engine) is None
    write_tuning(engine, tuning_of())
    assert_same(read(engine), tuning_of())
    assert read(engine, "cpu, 4 threads", "before") is None
    assert len(json.loads(tuning_path(engine).read_text())["tunings"]) == 1


def change(value: Any, place: Sequence[str | int], new: Any) -> None:
    for key in place[:-1]:
        value = value[key]
    if new is KeyError:
        del value[place[-1]]
    else:
        value[place[-1]] = new


OWN = ("tunings", 0)
FIRST = (*OWN, "sizes", 0)


@pytest.mark.parametrize(
    ("place", "new"),
    [
        (("version",), 2),
        (("version",), "1"),
        (("tunings",), KeyError),
        (("tunings",), 3),
        (("tunings",), ["text"]),
        ((*OWN, "device"), KeyError),
        ((*OWN, "engine_sha256"), KeyError),
        ((*OWN, "rate"), KeyError),
        ((*OWN, "rate"), "fast"),
        ((*OWN, "rate"), None),
        ((*OWN, "rate"), 0),
        ((*OWN, "rate"), float("nan")),
        ((*OWN, "draft_value"), -1),
        ((*OWN, "draft_value"), float("inf")),
        ((*OWN, "draft_value"), 1e300),
        ((*OWN, "rate"), 10**400),
        ((*OWN, "kind"), KeyError),
        ((*OWN, "kind"), 3),
        ((*OWN, "device"), 3),
        ((*OWN, "about"), []),
        ((*OWN, "contexts"), []),
        ((*OWN, "contexts"), [128]),
        ((*OWN, "contexts"), [1024, 128]),
        ((*OWN, "contexts"), [128, 128]),
        ((*OWN, "contexts"), [-1, 128]),
        ((*OWN, "contexts"), [128, float("inf")]),
        ((*OWN, "contexts"), "128"),
        ((*OWN, "contexts"), [0, 10**15]),
        ((*OWN, "contexts"), list(range(100_000))),
        ((*OWN, "sizes"), []),
        ((*OWN, "sizes"), {}),
        ((*OWN, "sizes"), KeyError),
        ((*FIRST, "tree_rows"), 2),
        ((*FIRST, "pseudo_rows"), [1, 0, 0]),
        ((*FIRST, "pseudo_rows"), [0, 0]),
        ((*OWN, "sizes", 1, "tree_rows"), 0),
        ((*OWN, "sizes", 1, "tree_rows"), 10**9),
        ((*OWN, "sizes", 1, "tree_rows"), True),
        ((*OWN, "sizes", 1, "tree_rows"), 2.5),
        ((*OWN, "sizes", 1, "tree_rows"), float("inf")),
        ((*OWN, "sizes", 1, "pseudo_rows"), [4, 2]),
        ((*OWN, "sizes", 1, "pseudo_rows"), [4, -2, 2]),
        ((*OWN, "sizes", 1, "pseudo_rows"), [5, 2, 2]),
        ((*OWN, "sizes", 1, "pseudo_rows"), [4, 0, 2]),
        ((*OWN, "sizes", 1, "pseudo_rows"), "422"),
        ((*OWN, "sizes", 1, "pseudo_rows"), None),
        ((*FIRST, "milliseconds"), KeyError),
        ((*FIRST, "milliseconds"), 3),
        ((*FIRST, "milliseconds"), [3]),
        ((*FIRST, "milliseconds"), [3, 0]),
        ((*FIRST, "milliseconds"), [3, -1]),
        ((*FIRST, "milliseconds"), [3, "x"]),
        ((*FIRST, "milliseconds"), [3, float("nan")]),
        ((*FIRST, "milliseconds"), [3, 10**400]),
        ((*FIRST, "milliseconds"), [3, 1e-300]),
        ((*FIRST, "milliseconds"), [3, 1e300]),
        ((*FIRST, "milliseconds"), [3] * 100_000),
    ],
)
def test_a_damaged_tuning_is_one_clear_error_and_can_be_measured_again(
    engine: Path, place: tuple[str | int, ...], new: Any
) -> None:
    write_tuning(engine, tuning_of())
    value = json.loads(tuning_path(engine).read_text())
    change(value, place, copy.deepcopy(new))
    tuning_path(engine).write_text(json.dumps(value))
    with pytest.raises(EngineFileError, match=r"engine\.tuning\.json is not a valid tuning\.json \(.*; delete it, and"):
        read(engine)
    write_tuning(engine, tuning_of())
    assert_same(read(engine), tuning_of())


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b"{}"])
def test_a_tuning_file_that_holds_something_else(engine: Path, contents: bytes) -> None:
    tuning_path(engine).write_bytes(contents)
    with pytest.raises(EngineFileError, match=r"engine\.tuning\.json is not a valid tuning\.json \(.*ht-bench tune"):
        read(engine)
    write_tuning(engine, tuning_of())
    assert_same(read(engine), tuning_of())


@pytest.mark.parametrize(
    "contents",
    [
        b'{"format": "other", "version": 1, "tunings": []}',
        b'{"hidden_size": 32}',
        b'["notes"]',
        b'{"format": 3}',
        b" " * (5 << 20) + b'{"format": "other"}',
    ],
    ids=["another format", "no format", "a list", "a format that is no text", "a large file"],
)
def test_a_file_of_another_format_is_not_replaced(engine: Path, contents: bytes) -> None:
    tuning_path(engine).write_bytes(contents)
    with pytest.raises(EngineFileError, match=r"engine\.tuning\.json is not a valid tuning\.json"):
        read(engine)
    with pytest.raises(InputError, match=r"engine\.tuning\.json .*move it"):
        write_tuning(engine, tuning_of())
    assert tuning_path(engine).read_bytes() == contents


def test_what_is_nested_without_end_is_one_clear_error(engine: Path) -> None:
    write_tuning(engine, tuning_of())
    text = tuning_path(engine).read_text()
    for levels in (100, 100_000):
        about = '"about": {"x": ' + "[" * levels + "]" * levels + "}"
        tuning_path(engine).write_text(re.sub(r'"about": \{[^}]*\}', about, text))
        with pytest.raises(EngineFileError, match="nested too deeply"):
            read(engine)


def test_tunings_for_other_draft_steps_are_an_error(engine: Path) -> None:
    write_tuning(engine, tuning_of())
    with pytest.raises(EngineFileError, match=r"sizes of 3 draft steps, not 2"):
        read_tuning(engine, "abc", "cpu, 2 threads", replace(DIMS, transfer_layers=(0, 0)))


def test_tunings_of_another_version_are_not_carried_into_this_one(engine: Path) -> None:
    write_tuning(engine, tuning_of("other device"))
    value = json.loads(tuning_path(engine).read_text())
    tuning_path(engine).write_text(json.dumps({**value, "version": 0}))
    write_tuning(engine, tuning_of())
    assert read(engine, "other device") is None
    assert_same(read(engine), tuning_of())


def test_a_cpu_is_known_by_its_name_and_threads() -> None:
    assert len({cpu_name(None), cpu_name(1), cpu_name(2)}) == 3
    assert cpu_name(2).endswith(", 2 threads")


@pytest.fixture
def engine_copy(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny engine, never tuned; with time to measure it however busy the machine is."""
    monkeypatch.setattr("runtime.tuning.QUICK_SECONDS", 60.0)
    shutil.copytree(tiny_engine.parent, tmp_path, dirs_exist_ok=True)
    tuning_path(tmp_path / tiny_engine.name).unlink(missing_ok=True)
    return tmp_path / tiny_engine.name


def unmeasured(*arguments: Any, **options: Any) -> Tuning:
    raise AssertionError("measured")


def test_an_engine_is_measured_when_it_is_first_loaded(engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Generator(engine_copy, threads=1)
    assert first.tuning is not None
    assert first.tuning.menu.sizes == menu_sizes(first.about.tree)
    assert tuning_path(engine_copy).is_file()
    monkeypatch.setattr("runtime.tuning.quick", unmeasured)
    second = Generator(engine_copy, threads=1)
    assert_same(second.tuning, first.tuning)
    plain = first.generate("Hello", max_new_tokens=40, speculate=False)
    assert second.generate("Hello", max_new_tokens=40).tokens == plain.tokens
    with pytest.raises(AssertionError, match="measured"):
        Generator(engine_copy, threads=2)


def test_an_engine_that_is_not_to_adapt_is_neither_measured_nor_is_its_tuning_read(
    engine_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.tuning.quick", unmeasured)
    assert Generator(engine_copy, threads=1, adapt=False).tuning is None
    assert not tuning_path(engine_copy).exists()
    tuning_path(engine_copy).write_text("damaged")
    assert Generator(engine_copy, threads=1, adapt=False).tuning is None
    with pytest.raises(EngineFileError, match=r"engine\.tuning\.json is not a valid tuning\.json"):
        Generator(engine_copy, threads=1)


def test_a_folder_that_cannot_be_written_is_no_obstacle(engine_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise InputError("cannot write")

    monkeypatch.setattr("runtime.tuning.write_tuning", refuse)
    assert Generator(engine_copy, threads=1).tuning is not None
    assert not tuning_path(engine_copy).exists()


def test_an_engine_with_room_for_few_tokens_is_measured_within_it(engine_copy: Path) -> None:
    path = engine_copy.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_context": 16}))
    generator = Generator(engine_copy, threads=1)
    assert generator.tuning is not None
    assert generator.tuning.menu.contexts == (3,)
    found, plain = (
        generator.generate("Hello", raw=True, max_new_tokens=50, speculate=speculate) for speculate in (True, False)
    )
    assert found.tokens == plain.tokens
    assert found.prompt_tokens + len(found.tokens) == 16
