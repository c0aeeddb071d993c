"""The engine of the graph lowered for the CPU, whose cache is written in place, against that of the portable graph."""

import gc
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import EngineFileError, Generator
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import FORMAT_VERSION, FileRecord, read_engine_file
from runtime.engines import dense_cache
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.engines.onnxruntime_cpu import MOST_BOUND, InPlaceResult, OnnxRuntimeCpuEngine
from runtime.engines.places import PlacedSlot
from runtime.engines.protocol import Batch, Engine
from runtime.rows import Rows, lay_out
from runtime.tree import Tree, TreeSizes, chain
from tests.passes import run_one
from tests.strategies import trees

NOTHING = np.empty(0, dtype=np.int64)


@pytest.fixture(scope="module")
def engine(tiny_engine: Path) -> OnnxRuntimeCpuEngine:
    return open_cpu(tiny_engine)


@pytest.fixture(scope="module")
def portable(tiny_engine: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(tiny_engine, read_engine_file(tiny_engine).dims, threads=1)


@pytest.fixture
def small_blocks() -> Iterator[None]:
    """Let caches grow often."""
    with mock.patch.object(dense_cache, "BLOCK", 8):
        yield


def open_cpu(path: Path) -> OnnxRuntimeCpuEngine:
    return OnnxRuntimeCpuEngine(path.with_name("engine.cpu.onnx"), read_engine_file(path).dims, threads=1)


def rows_of(tokens: list[int], start: int, dims: GraphDims) -> Rows:
    """Return a chain without pseudo rows."""
    return lay_out(chain(tokens), (NOTHING,) * dims.num_steps, dims.join_order, start)


def random_pass(rng: np.random.Generator, dims: GraphDims, tree: Tree, start: int) -> Rows:
    """Return rows of `tree` with any pseudo rows."""
    ends = (rng.permutation(len(tree))[: rng.integers(0, len(tree) + 1)] for _ in range(dims.num_steps))
    return lay_out(tree, tuple(np.sort(rows) for rows in ends), dims.join_order, start)


def path_to(tree: Tree, node: int) -> list[int]:
    """Return the nodes from the root to `node`."""
    return [*path_to(tree, int(tree.parents[node])), node] if node else [0]


def texts(engine: Engine, prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Decode plainly after all prompts at once, each with a cache of its own; yield all texts so far."""
    dims = engine.dims
    found: list[list[int]] = [[] for _ in prompts]
    waiting = [list(prompt) for prompt in prompts]
    slots = [engine.new_slot() for _ in prompts]
    while True:
        for text, tokens, slot in zip(found, waiting, slots, strict=True):
            result = run_one(engine, rows_of(tokens, slot.length, dims), slot)
            engine.commit(result, [range(len(tokens))])
            text.append(int(result.outputs(0).logits[len(tokens) - 1].argmax()))
            tokens[:] = text[-1:]
        yield found


def texts_together(engine: Engine, prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Decode plainly after all prompts in one pass each time; yield all texts so far."""
    found: list[list[int]] = [[] for _ in prompts]
    waiting = [list(prompt) for prompt in prompts]
    slots = [engine.new_slot() for _ in prompts]
    while True:
        rows = [rows_of(tokens, slot.length, engine.dims) for tokens, slot in zip(waiting, slots, strict=True)]
        result = engine.run(Batch.of(rows, slots))
        engine.commit(result, [range(len(tokens)) for tokens in waiting])
        for index, (text, tokens) in enumerate(zip(found, waiting, strict=True)):
            text.append(int(result.outputs(index).logits[len(tokens) - 1].argmax()))
            tokens[:] = text[-1:]
        yield found


def text_of(engine: Engine, prompt: list[int], count: int) -> list[int]:
    for found in texts(engine, [prompt]):
        if len(found[0]) == count:
            return found[0]
    raise AssertionError


def committed_rows(engine: OnnxRuntimeCpuEngine, slot: PlacedSlot) -> np.ndarray:
    """Return the keys and values [2, L, Hkv, length, D] that are committed to `slot`."""
    return engine.keep(slot, slot.length).arrays


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_after_any_accepted_paths_of_any_requests_each_has_the_cache_that_it_has_alone(
    tiny_engine: Path, engine: OnnxRuntimeCpuEngine, portable: OnnxRuntimeEngine, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    dims = engine.dims
    with mock.patch.object(dense_cache, "BLOCK", 8):
        requests = [(engine.new_slot(), portable.new_slot()) for _ in range(data.draw(st.integers(1, 5)))]
        for _ in range(data.draw(st.integers(1, 6))):
            chosen = data.draw(st.permutations(requests))[: data.draw(st.integers(1, len(requests)))]
            plain = data.draw(st.booleans())
            asked = [data.draw(trees(max_rows=1 if plain else 10)) for _ in chosen]
            rows = [
                rows_of(tree.tokens.tolist(), copied.length, dims)
                if plain
                else random_pass(rng, dims, tree, copied.length)
                for tree, (_, copied) in zip(asked, chosen, strict=True)
            ]
            found = engine.run(Batch.of(rows, [slot for slot, _ in chosen]))
            accepted = [path_to(tree, int(rng.integers(len(tree)))) if rng.random() < 0.9 else [] for tree in asked]
            for index, ((_, copied), one) in enumerate(zip(chosen, rows, strict=True)):
                expected = run_one(portable, one, copied)
                outputs, alone = found.outputs(index), expected.outputs(0)
                np.testing.assert_allclose(np.array(outputs.logits), np.array(alone.logits), atol=2e-4, strict=True)
                assert len(outputs.draft_logits) == len(alone.draft_logits) == sum(one.counts)
                for row in range(sum(one.counts)):
                    np.testing.assert_allclose(outputs.draft_logits[row], alone.draft_logits[row], atol=2e-4)
                portable.commit(expected, [accepted[index]])
            engine.commit(found, accepted)
            for slot, copied in requests:
                assert slot.length == copied.length
                ours = committed_rows(engine, slot)
                for kind, theirs in zip(ours, (copied.keys, copied.values), strict=True):
                    np.testing.assert_allclose(kind, theirs[:, 0, :, : copied.length], atol=2e-4)


def test_a_request_goes_on_from_rows_that_were_kept_or_are_anothers(
    engine: OnnxRuntimeCpuEngine, portable: OnnxRuntimeEngine
) -> None:
    def follow(slot: PlacedSlot) -> np.ndarray:
        return run_one(engine, rows_of([17, 18], slot.length, engine.dims), slot).logits.copy()

    tokens = [11, 12, 13, 14, 15]
    first = engine.new_slot()
    engine.commit(run_one(engine, rows_of(tokens, 0, engine.dims), first), [range(5)])
    kept = engine.keep(first, 4)
    from_slot, from_kept, alone = (engine.new_slot() for _ in range(3))
    engine.copy(first, from_slot, 3)
    engine.release(first)
    engine.copy(kept, from_kept, 3)
    engine.commit(run_one(engine, rows_of(tokens[:3], 0, engine.dims), alone), [range(3)])
    assert from_slot.length == from_kept.length == 3 < kept.length
    expected = follow(alone)
    np.testing.assert_allclose(follow(from_slot), expected, atol=1e-5)
    np.testing.assert_allclose(follow(from_kept), expected, atol=1e-5)


def test_drafts_that_overflowed_do_not_spoil_the_passes_after_them(engine: OnnxRuntimeCpuEngine) -> None:
    """Attention over the trees of several requests reads what lies behind the valid rows, and 0 times inf is none."""
    expected = engine.new_slot(), engine.new_slot()
    overflowed = engine.new_slot(), engine.new_slot()
    logits = []
    for slots in (expected, overflowed):
        rows = [rows_of([5, 6, 7, 8], 0, engine.dims)] * 2
        result = engine.run(Batch.of(rows, slots))
        if slots is overflowed:
            result.cache.of(slots[0])[..., 2:4, :] = np.inf
        engine.commit(result, [[0], [0, 1]])
        rows = [rows_of([9, 10], slot.length, engine.dims) for slot in slots]
        logits.append(engine.run(Batch.of(rows, slots)).logits.copy())
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-6)


@pytest.mark.parametrize("lowered", [True, False])
def test_requests_that_failed_commit_nothing(
    engine: OnnxRuntimeCpuEngine, portable: OnnxRuntimeEngine, lowered: bool
) -> None:
    one: Engine = engine if lowered else portable
    slots = [one.new_slot() for _ in range(3)]
    rows = [rows_of([5, 6], 0, one.dims) for _ in slots]
    one.commit(one.run(Batch.of(rows, slots)), [(), range(2), ()])
    assert [slot.length for slot in slots] == [0, 2, 0]
    expected = one.run(Batch.of([rows_of([9], 0, one.dims)], [one.new_slot()])).outputs(0).logits[0].copy()
    for slot in (slots[0], slots[2]):
        found = one.run(Batch.of([rows_of([9], 0, one.dims)], [slot])).outputs(0).logits[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def generators(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Generator, Generator]:
    """The tiny engine as it is, and without its lowered graph."""
    folder = tmp_path_factory.mktemp("portable") / "engine"
    shutil.copytree(tiny_engine.parent, folder)
    engine = folder / tiny_engine.name
    replace(read_engine_file(engine), cpu_graph=None).write(engine.with_suffix(".json"))
    return Generator(tiny_engine, threads=1), Generator(engine, threads=1)


@pytest.mark.parametrize("prompt", ["a", "Hello there", "x" * 40])
@pytest.mark.parametrize("tree", [TreeSizes(6, (6, 4, 2)), TreeSizes(3, (1, 0, 0)), TreeSizes(150, (150, 150, 150))])
def test_drafting_and_verifying_gives_the_tokens_of_the_portable_engine(
    generators: tuple[Generator, Generator], tree: TreeSizes, prompt: str
) -> None:
    found, expected = (generator.generate(prompt, max_new_tokens=40, tree=tree) for generator in generators)
    assert (found.tokens, found.accepted) == (expected.tokens, expected.accepted)


@pytest.mark.usefixtures("small_blocks")
def test_a_text_does_not_disturb_one_that_begins_after_it_or_alternates_with_it(
    engine: OnnxRuntimeCpuEngine, portable: OnnxRuntimeEngine
) -> None:
    prompts = [[7, 8, 9], [100] * 30, [5]]
    expected = [text_of(portable, prompt, 25) for prompt in prompts]
    # Different ones, or there would be nothing to see.
    assert len({tuple(text) for text in expected}) == 3
    assert [text_of(engine, prompt, 25) for prompt in prompts] == expected
    for found in texts(engine, prompts):
        if len(found[0]) == 25:
            break
    assert found == expected
    for found in texts_together(engine, prompts):
        if len(found[0]) == 25:
            break
    assert found == expected


def test_outputs_hold_until_the_next_pass_only_and_are_refused_afterwards(engine: OnnxRuntimeCpuEngine) -> None:
    cache = engine.new_slot()
    first = run_one(engine, rows_of([3, 4, 5], 0, engine.dims), cache)
    kept = first.logits.copy()
    engine.commit(first, [range(3)])
    np.testing.assert_array_equal(first.outputs(0).logits[2], kept[2])
    with pytest.raises(RuntimeError, match="a pass is committed once"):
        engine.commit(first, [range(3)])
    second = run_one(engine, rows_of([6, 7, 8], 3, engine.dims), cache)
    assert np.shares_memory(first.logits, second.logits)
    assert not np.array_equal(second.logits, kept)
    for use in (lambda: first.outputs(0), lambda: first.new(engine.dims), lambda: engine.commit(first, [[0]])):
        with pytest.raises(RuntimeError, match="the engine has run another one since"):
            use()
    assert cache.length == 3


def test_a_pass_has_the_logits_that_were_asked_for_and_no_more(engine: OnnxRuntimeCpuEngine) -> None:
    vocab = engine.dims.vocab_size
    # Fewer than before, and none.
    for count, wanted in ((9, 9), (9, 2), (1, 1), (5, 0)):
        tree = chain(list(range(count)))
        ends = (np.arange(wanted), NOTHING, NOTHING)
        rows = lay_out(tree, ends, engine.dims.join_order, 0, logit_rows=np.arange(wanted))
        found = run_one(engine, rows, engine.new_slot())
        assert found.logits.shape == found.draft_logits.shape == (wanted, vocab)
        outputs = found.outputs(0)
        assert len(outputs.logits) == len(outputs.draft_logits) == wanted


def spread(array: np.ndarray) -> np.ndarray:
    """Return the same values, not next to each other in memory."""
    wide = np.zeros(tuple(3 * size for size in array.shape), dtype=array.dtype)
    view = wide[tuple(slice(None, None, 3) for _ in array.shape)]
    view[...] = array
    return view


def test_inputs_need_not_be_contiguous(engine: OnnxRuntimeCpuEngine) -> None:
    rows = lay_out(chain([3, 1, 4, 1, 5]), (np.arange(4), np.arange(3), np.arange(2)), engine.dims.join_order, 0)
    # A mask that reads otherwise by columns.
    assert not np.array_equal(rows.tree_mask, rows.tree_mask.T)
    expected = run_one(engine, rows, engine.new_slot()).logits.copy()
    for change in (spread, np.asfortranarray):
        changed = replace(
            rows,
            input_ids=change(rows.input_ids),
            position_ids=change(rows.position_ids),
            tree_mask=change(rows.tree_mask),
            pseudo_parents=tuple(change(parents) for parents in rows.pseudo_parents),
            logit_rows=change(rows.logit_rows),
        )
        assert not changed.tree_mask.flags.c_contiguous
        np.testing.assert_array_equal(run_one(engine, changed, engine.new_slot()).logits, expected)


class Spy:
    """A session's binding that remembers what was bound where."""

    def __init__(self, binding: Any) -> None:
        self.binding = binding
        self.addresses: dict[str, int] = {}
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.binding, name)
        if not name.startswith("bind_"):
            return call

        def bind(value: str, device: str, number: int, dtype: Any, shape: Any, address: int) -> None:
            self.addresses[value] = address
            self.calls[value] += 1
            call(value, device, number, dtype, shape, address)

        return bind


@pytest.mark.usefixtures("small_blocks")
def test_the_cache_is_bound_once_at_one_address_as_input_and_output(tiny_engine: Path) -> None:
    engine = open_cpu(tiny_engine)
    spies: list[Spy] = []
    session = engine._session
    ran: list[Spy] = []

    def spy() -> Spy:
        spies.append(Spy(session.io_binding()))
        return spies[-1]

    def run_session(bound: Spy) -> None:
        ran.append(bound)
        session.run_with_iobinding(bound.binding)

    engine._session = mock.Mock(io_binding=spy, run_with_iobinding=run_session)
    slots = [engine.new_slot() for _ in range(3)]
    shapes = set()
    for step in range(20):
        # The first of them alone, and all together.
        for chosen in (slots[:1], slots):
            rows = [rows_of([1, 2], slot.length, engine.dims) for slot in chosen]
            result = engine.run(Batch.of(rows, chosen))
            for kind, name in enumerate(("key", "value")):
                for layer in range(engine.dims.num_layers):
                    address = result.cache.of(slots[0])[kind, layer].ctypes.data
                    assert ran[-1].addresses[f"{name}_cache_{layer}"] == address
                    assert ran[-1].addresses[f"{name}_cache_out_{layer}"] == address
            engine.commit(result, [[0, 1] if step % 2 else []] * len(chosen))
            shapes.add((result.cache.arrays.shape, len(chosen)))
    assert 4 < len(spies) == len(shapes) < 20
    assert {count for one in spies for name, count in one.calls.items() if "_cache_" in name} == {1}
    # The other inputs are bound once too, as they had the same shapes all the time.
    names = {binding.name for binding in engine.dims.lowered_inputs()}
    assert all(one.calls.keys() >= names for one in spies)
    assert {count for one in spies for name, count in one.calls.items() if name in names} == {1}


def test_passes_of_changing_shapes_have_the_inputs_of_their_own(
    engine: OnnxRuntimeCpuEngine, tiny_engine: Path
) -> None:
    """Longer and shorter ones, with pseudo rows and without, of one and of several requests, in any order; each as an
    engine that ran nothing before has it.
    """
    order, rng = engine.dims.join_order, np.random.default_rng(3)
    slots = [engine.new_slot() for _ in range(3)]
    passes = []
    for size, pseudo, count in [(1, 0, 1), (3, 2, 1), (1, 0, 3), (3, 1, 3), (3, 2, 1), (3, 2, 1), (1, 0, 1), (3, 2, 3)]:
        parents = tuple(np.sort(rng.permutation(size)[:pseudo]) for _ in order)
        batch = [lay_out(chain(rng.integers(0, 9, size).tolist()), parents, order, 0) for _ in range(count)]
        passes.append(batch)
    for batch in passes:
        found = engine.run(Batch.of(batch, slots[: len(batch)]))
        fresh = open_cpu(tiny_engine)
        expected = fresh.run(Batch.of(batch, [fresh.new_slot() for _ in batch]))
        np.testing.assert_array_equal(found.logits, expected.logits)
        np.testing.assert_array_equal(found.draft_logits, expected.draft_logits)


def test_few_sets_of_slots_stay_bound(tiny_engine: Path) -> None:
    engine = open_cpu(tiny_engine)
    slots = [engine.new_slot() for _ in range(MOST_BOUND + 3)]
    for slot in [*slots, *slots]:
        run_one(engine, rows_of([1], 0, engine.dims), slot)
    assert len(engine._bound) == MOST_BOUND


def test_an_engine_that_goes_frees_its_cache_and_keeps_no_slot_alive(tiny_engine: Path) -> None:
    engine = open_cpu(tiny_engine)
    slot = engine.new_slot()
    result = run_one(engine, rows_of([1, 2], 0, engine.dims), slot)
    memory, alive = weakref.ref(result.cache.arrays), weakref.ref(slot)
    del result, slot
    gc.collect()
    assert alive() is None
    del engine
    gc.collect()
    assert memory() is None


def test_a_batch_is_refused_that_is_larger_than_the_engine_takes(engine: OnnxRuntimeCpuEngine) -> None:
    slots = [engine.new_slot() for _ in range(engine.max_batch + 1)]
    rows = [rows_of([1], 0, engine.dims) for _ in slots]
    assert isinstance(engine.run(Batch.of(rows[1:], slots[1:])), InPlaceResult)
    with pytest.raises(AssertionError):
        engine.run(Batch.of(rows, slots))


def test_new_rows_are_those_alive_at_each_layer(engine: OnnxRuntimeCpuEngine) -> None:
    cache = engine.new_slot()
    # Transfer layers 3, 1, 3.
    rows = lay_out(chain([3, 1, 4]), (np.arange(3), np.arange(2), np.arange(1)), engine.dims.join_order, 0)
    for arrays in run_one(engine, rows, cache).new(engine.dims):
        assert [array.shape[2] for array in arrays] == [3, 5, 5, 9]
        assert all(np.abs(array).min(axis=(0, 1, 3)).max() > 0 for array in arrays)


@pytest.fixture
def engine_copy(tiny_engine: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_engine.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / tiny_engine.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no graph", r"engine\.cpu\.onnx and its weights do not go together \(that is no ONNX graph: "),
        # A model with a version of the format alone.
        (b"\x08\x0a", r"ONNX Runtime \S+ cannot load .*engine\.cpu\.onnx: .*; update onnxru"),
    ],
)
def test_a_graph_that_onnx_runtime_cannot_load(engine_copy: Path, content: bytes, message: str) -> None:
    lowered = engine_copy.with_name("engine.cpu.onnx")
    lowered.write_bytes(content)
    replace(read_engine_file(engine_copy), cpu_graph=FileRecord.of(lowered)).write(engine_copy.with_suffix(".json"))
    with pytest.raises(EngineFileError, match=message):
        Generator(engine_copy)


@pytest.mark.parametrize("change", ["type", "shape", "offset", "length", "no number"])
def test_weights_that_cannot_be_where_the_graph_says(engine_copy: Path, change: str) -> None:
    lowered = engine_copy.with_name("engine.cpu.onnx")
    model = onnx.load(lowered, load_external_data=False)
    tensor = next(one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL)
    entries = {entry.key: entry for entry in tensor.external_data}
    if change == "type":
        tensor.data_type = onnx.TensorProto.STRING
    elif change == "shape":
        tensor.dims[0] = -tensor.dims[0]
        tensor.dims[1] = -tensor.dims[1]
    elif change == "offset":
        entries["offset"].value = str(1 << 62)
    elif change == "length":
        entries["length"].value = "4"
    else:
        entries["offset"].value = "x"
    onnx.save(model, lowered)
    replace(read_engine_file(engine_copy), cpu_graph=FileRecord.of(lowered)).write(engine_copy.with_suffix(".json"))
    with pytest.raises(EngineFileError, match="and its weights do not go together"):
        Generator(engine_copy)


def test_no_file_of_an_engine_stays_mapped_or_open(engine_copy: Path) -> None:
    generator = Generator(engine_copy, threads=1, adapt=False)
    folder = str(engine_copy.parent)
    assert folder not in Path("/proc/self/maps").read_text()
    handles = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in handles if name.startswith(folder)]
    assert generator.generate("a", max_new_tokens=3).tokens


def test_a_graph_that_is_not_the_lowered_one(engine_copy: Path) -> None:
    lowered = engine_copy.with_name("engine.cpu.onnx")
    shutil.copy(engine_copy, lowered)
    replace(read_engine_file(engine_copy), cpu_graph=FileRecord.of(lowered)).write(engine_copy.with_suffix(".json"))
    with pytest.raises(EngineFileError, match=r"engine\.cpu\.onnx does not have the graph its engine\.json describes"):
        Generator(engine_copy)


def test_an_engine_of_the_version_before_is_refused(engine_copy: Path) -> None:
    described = engine_copy.with_suffix(".json")
    about = json.loads(described.read_text())
    del about["cpu_graph"]
    described.write_text(json.dumps({**about, "version": FORMAT_VERSION - 1}))
    message = (
        f"of version {FORMAT_VERSION - 1}, and this runtime reads versions {FORMAT_VERSION} and 5; .* export the engine"
    )
    with pytest.raises(EngineFileError, match=message):
        Generator(engine_copy)


def test_an_engine_in_half_precision_has_no_lowered_graph_and_runs(half_engine: Path) -> None:
    about = read_engine_file(half_engine)
    assert (about.precision, about.cpu_graph) == ("float16", None)
    assert not half_engine.with_name("engine.cpu.onnx").exists()
    result = Generator(half_engine, threads=1).generate("Hello", max_new_tokens=20)
    assert len(result.tokens) == 20
