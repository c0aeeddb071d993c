"""The TensorRT engine on a simulated GPU: addresses, copies, graphs and checks are real, kernels and plans are not."""

import gc
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins.choosing import TOP_ROOM, answer_words
from runtime import EngineError, EngineFileError, Generator, InputError, Sampling, TreeSizes
from runtime.bundle.engine_file import EngineFile, FileRecord, read_engine_file
from runtime.bundle.places import engine_file_path
from runtime.engines import tensorrt
from runtime.engines.places import PlacedSlot
from runtime.engines.tensorrt import TensorRTEngine
from runtime.rows import lay_out, prompt_rows
from runtime.tree import chain

pytest.importorskip("cuda.bindings")

from tests.passes import run_one
from tests.runtime.engines.gpu_engines import LIMITS, kernels_of, make_plan, use_gpu
from tests.runtime.engines.simulated_gpu import SimulatedDriver, simulated_tensorrt


@pytest.fixture
def plan(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny engine as a plan of one request for the simulated GPU."""
    path = make_plan(tiny_engine, tmp_path, LIMITS, monkeypatch)
    use_gpu(path, monkeypatch)
    return path


def rewrite(path: Path, **plan_fields: Any) -> None:
    about: EngineFile = read_engine_file(path)
    assert about.plan is not None
    replace(about, plan=replace(about.plan, **plan_fields)).write(engine_file_path(path))


@pytest.mark.parametrize("prompt", ["a", "Hello there", "x" * 40])
def test_text_is_that_of_onnx_runtime(plan: Path, tiny_engine: Path, prompt: str) -> None:
    expected = Generator(tiny_engine, threads=1, adapt=False).generate(prompt, max_new_tokens=100)
    generator = Generator(plan)
    # Once more with passes that are captured, over memory that the first text was in.
    for _ in range(2):
        found = generator.generate(prompt, max_new_tokens=100)
        assert (found.tokens, found.steps) == (expected.tokens, expected.steps)
    assert generator.generate(prompt, max_new_tokens=100, speculate=False).tokens == expected.tokens


@pytest.mark.parametrize("with_choices", [True, False])
def test_drafts_with_a_head_of_their_own(
    draft_head_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_choices: bool
) -> None:
    path = make_plan(draft_head_engine, tmp_path, LIMITS, monkeypatch)
    if not with_choices:
        about = read_engine_file(path)
        kernels = path.with_name("engine.kernels.bin")
        kernels.write_bytes(kernels_of(about, with_choices=False))
        rewrite(path, kernels=FileRecord.of(kernels))
    use_gpu(path, monkeypatch)
    expected = Generator(draft_head_engine, threads=1, adapt=False)
    generator = Generator(path)
    assert (generator.engine._choices is not None) == with_choices  # type: ignore[attr-defined]
    for prompt in ("a", "Hello there", "x" * 40):
        for sampling in (None, Sampling(temperature=0.9, seed=5)):
            one, other = (each.generate(prompt, max_new_tokens=60, sampling=sampling) for each in (expected, generator))
            assert (other.tokens, other.steps) == (one.tokens, one.steps)


@pytest.mark.parametrize("tree", [TreeSizes(1, (1, 1, 1)), TreeSizes(3, (1, 0, 0)), TreeSizes(12, (12, 12, 12))])
def test_other_trees_give_the_same_text(plan: Path, tiny_engine: Path, tree: TreeSizes) -> None:
    expected = Generator(tiny_engine, threads=1).generate("Hello", max_new_tokens=50, tree=tree)
    found = Generator(plan).generate("Hello", max_new_tokens=50, tree=tree)
    assert (found.tokens, found.steps) == (expected.tokens, expected.steps)


def test_a_text_that_fills_the_context(plan: Path) -> None:
    generator = Generator(plan)
    plain = generator.generate("y" * 80, max_new_tokens=500, speculate=False)
    found = generator.generate("y" * 80, max_new_tokens=500)
    assert found.tokens == plain.tokens
    assert found.prompt_tokens + len(found.tokens) == LIMITS.max_context


def test_few_shapes_are_captured_and_then_replayed(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use_gpu(plan, monkeypatch)
    generator = Generator(plan)
    steps = 0
    for prompt in ("Hello", "Hello there, you", "z" * 33):
        steps += generator.generate(prompt, max_new_tokens=60).steps
    engine = generator.engine
    assert isinstance(engine, TensorRTEngine)
    # The usual sizes at 16, 32, 64 and 128 rows of cache, and the first pass of each, with no node to draft from.
    assert len(engine._passes) <= 8
    assert driver.launched_graphs > steps / 2
    held = len(driver._allocations) + len(driver._pinned)
    assert held
    del engine, generator
    gc.collect()
    assert not driver._allocations
    assert not driver._pinned
    assert not driver._graphs


def test_a_pass_that_cannot_be_captured_runs_without(
    plan: Path, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: SimulatedDriver, stream: int) -> None:
        self._captured = None
        raise MemoryError

    monkeypatch.setattr(SimulatedDriver, "_cuStreamEndCapture", refuse)
    expected = Generator(tiny_engine, threads=1).generate("Hello", max_new_tokens=60)
    generator = Generator(plan)
    assert generator.generate("Hello", max_new_tokens=60).tokens == expected.tokens
    assert isinstance(generator.engine, TensorRTEngine)
    captured, shapes = generator.engine.captured
    assert (captured, shapes > 0, generator.engine.refused > 1) == (0, True, True)


def committed(engine: TensorRTEngine, tokens: list[int]) -> PlacedSlot:
    """Return a new slot with the rows of `tokens`."""
    slot = engine.new_slot()
    for start in range(0, len(tokens), LIMITS.chunk):
        part = tokens[start : start + LIMITS.chunk]
        result = run_one(engine, prompt_rows(part, engine.dims.join_order, start), slot)
        engine.commit(result, [range(len(part))])
    return slot


def logits_after(engine: TensorRTEngine, slot: PlacedSlot, token: int) -> np.ndarray:
    """Return the logits after a token behind the rows of `slot`, which stay as they are."""
    rows = prompt_rows([token], engine.dims.join_order, slot.length)
    return np.array(run_one(engine, rows, slot).outputs(0).logits[0])


# More than the smallest cache has, and fewer; of these all, some, and one.
@pytest.mark.parametrize(("length", "kept", "restored"), [(40, 40, 40), (40, 37, 20), (40, 9, 1), (9, 9, 9), (9, 5, 3)])
def test_kept_rows_come_back_when_other_texts_were_where_they_had_been(
    plan: Path, length: int, kept: int, restored: int
) -> None:
    engine = Generator(plan).engine
    assert isinstance(engine, TensorRTEngine)
    tokens = [(7 * position) % 250 + 3 for position in range(length)]
    copies = engine.keep(committed(engine, tokens), kept)
    assert copies.length == kept
    others = committed(engine, [5] * 50)
    assert others.length == 50
    slot = engine.new_slot()
    engine.copy(copies, slot, restored)
    # Kept rows are free when nothing refers to them, even before the copy that was enqueued is done.
    del copies
    assert slot.length == restored
    found = logits_after(engine, slot, 11)
    expected = logits_after(engine, committed(engine, tokens[:restored]), 11)
    np.testing.assert_array_equal(found, expected)


def test_kept_rows_give_their_memory_back(plan: Path) -> None:
    engine = Generator(plan).engine
    assert isinstance(engine, TensorRTEngine)
    slot = committed(engine, [3] * 20)
    free = engine._cuda.free_memory()
    kept = [engine.keep(slot, rows) for rows in (20, 20, 1)]
    assert engine._cuda.free_memory() <= free - 41 * engine.row_bytes
    kept.clear()
    assert engine._cuda.free_memory() == free


def test_a_request_that_failed_commits_nothing(plan: Path) -> None:
    engine = Generator(plan).engine
    assert isinstance(engine, TensorRTEngine)
    slot = committed(engine, [3, 4, 5])
    expected = logits_after(engine, slot, 6)
    result = run_one(engine, prompt_rows([9, 9], engine.dims.join_order, 3), slot)
    engine.commit(result, [()])
    assert slot.length == 3
    np.testing.assert_array_equal(logits_after(engine, slot, 6), expected)


def test_a_last_prompt_chunk_of_one_token_runs_as_a_prompt(plan: Path, tiny_engine: Path) -> None:
    generator = Generator(plan)
    chunk = generator.about.prompt_chunk
    text = next("x" * n for n in range(1, 40) if len(generator.encode("x" * n)) % chunk == 1)
    found = generator.generate(text, max_new_tokens=1)
    assert isinstance(generator.engine, TensorRTEngine)
    # Nothing is captured for it.
    assert generator.engine.captured == (0, 0)
    assert found.tokens == Generator(tiny_engine, threads=1, adapt=False).generate(text, max_new_tokens=1).tokens


def test_outputs_of_a_pass_are_refused_after_the_next(plan: Path) -> None:
    engine = Generator(plan).engine
    slot = engine.new_slot()
    rows = prompt_rows([1, 2, 3], engine.dims.join_order, 0)
    first = run_one(engine, rows, slot)
    run_one(engine, rows, slot)
    with pytest.raises(RuntimeError, match="the engine has run another one since"):
        first.outputs(0)
    with pytest.raises(RuntimeError, match="the engine has run another one since"):
        engine.commit(first, [[0]])


def test_what_the_library_compiled_is_kept(plan: Path, tmp_path: Path) -> None:
    Generator(plan).generate("Hello", max_new_tokens=5)
    (kept,) = (tmp_path / "cache" / "hidden-transfer").iterdir()
    assert kept.read_bytes() == b"compiled"
    assert kept.name.startswith(read_engine_file(plan).graph.sha256[:32])


def test_more_rows_than_the_plan_was_built_for(plan: Path) -> None:
    generator = Generator(plan)
    with pytest.raises(InputError, match=r"built for up to 12 rows of each kind; .* --max-rows 14"):
        generator.stream("Hello there", tree=TreeSizes(14, (13, 14, 13)))
    engine = generator.engine
    nothing = (np.empty(0, dtype=np.int64),) * 3
    rows = lay_out(chain([1] * 13), nothing, engine.dims.join_order, 0)
    with pytest.raises(
        InputError, match=r"input_ids has 13 rows, and this plan was built for 1 to 12; .*--max-rows 13"
    ):
        run_one(engine, rows, engine.new_slot())
    rewrite(plan, limits=replace(LIMITS, chunk=8))
    with pytest.raises(InputError, match=r"input_ids has 16 rows, and this plan was built for 1 to 8; .* --chunk 16"):
        Generator(plan).generate("Hello there, this is long")


def test_a_shape_outside_the_profile_names_its_range(plan: Path) -> None:
    about = read_engine_file(plan).plan
    assert about is not None
    about.profiles["verification"]["key_cache_0"][2][2] = 20
    rewrite(plan, profiles=about.profiles)
    generator = Generator(plan)
    sys.modules["tensorrt_rtx"] = simulated_tensorrt(sys.modules["cuda.bindings"].driver, generator.about.dims, about)
    with pytest.raises(
        InputError,
        match=r"key_cache_0 of shape \(1, 2, 32, 8\) is outside .*, \(1, 2, 0, 8\) to \(1, 2, 20, 8\); .*--max-context",
    ):
        Generator(plan).generate("Hello", max_new_tokens=100)


@pytest.mark.parametrize(
    ("capability", "plan_fields", "message"),
    [
        ((7, 5), {}, r"was built for compute capability 8\.0, and Simulated GPU has 7\.5; .*--compute-capability 7\.5"),
        (
            (8, 6),
            {"product": "tensorrt"},
            r"was built for compute capability 8\.0, and Simulated GPU has 8\.6; export it again on this machine",
        ),
        ((9, 0), {}, r"compiled for compute capabilities 8\.0, and this GPU has 9\.0"),
    ],
)
def test_another_gpu(
    plan: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    plan_fields: dict[str, Any],
    message: str,
) -> None:
    rewrite(plan, **plan_fields)
    use_gpu(plan, monkeypatch, capability=capability)
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules["tensorrt_rtx"])
    with pytest.raises(EngineFileError, match=message):
        Generator(plan)


def test_a_gpu_with_too_little_memory(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_gpu(plan, monkeypatch, memory=64 << 10)
    with pytest.raises(InputError, match=r"the GPU has too little memory: .* MiB are needed and .* MiB are free"):
        Generator(plan)


def test_another_version(plan: Path) -> None:
    rewrite(plan, version="1.6.0.5")
    with pytest.raises(EngineFileError, match=r"built with tensorrt-rtx 1\.6\.0\.5, and 1\.7\.1\.116 is installed"):
        Generator(plan)


def test_another_plugin(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(plan, attention="plugin", plugin_version="0")
    with pytest.raises(EngineFileError, match="has tree attention of version 0, and this release runs version 2"):
        Generator(plan)

    def refuse(trt: Any) -> None:
        raise RuntimeError("it needs a link")

    monkeypatch.setattr(tensorrt, "register", refuse)
    rewrite(plan, plugin_version="2")
    with pytest.raises(InputError, match=r"the plugin of .*engine\.plan cannot be registered: it needs a link"):
        Generator(plan)


def test_no_library(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        InputError, match=r"needs tensorrt-rtx 1\.7.*cannot be imported.*hidden-transfer\[tensorrt-rtx\]"
    ):
        Generator(plan)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    rewrite(plan, product="tensorrt-lite")
    with pytest.raises(EngineFileError, match="the plan is for tensorrt-lite"):
        Generator(plan)


def test_what_the_library_itself_finds_wrong(plan: Path) -> None:
    plan.write_text("no plan")
    about = read_engine_file(plan)
    replace(about, graph=FileRecord.of(plan)).write(engine_file_path(plan))
    with pytest.raises(EngineFileError, match="cannot be used here: it is damaged; export it again"):
        Generator(plan)


def test_a_context_that_cannot_be_made(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(plan)
    engine = generator.engine
    assert isinstance(engine, TensorRTEngine)
    monkeypatch.setattr(type(engine._engine), "create_execution_context", lambda self, config: None)
    with pytest.raises(EngineError, match=r"the plan cannot be run \(it gives no reason\); the GPU has \d+ MiB"):
        generator.generate("Hello")


def test_what_the_library_logs_is_told_where_it_finds_nothing(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def validity(self: Any, plan: Any) -> tuple[int, int]:
        self._log.log(1, "CUDA driver version is insufficient\nmore")
        return 2, 0

    runtime = sys.modules["tensorrt_rtx"].Runtime
    monkeypatch.setattr(runtime, "get_engine_validity", validity)
    with pytest.raises(
        EngineFileError, match=r"engine\.plan cannot be used here: CUDA driver version is insufficient$"
    ):
        Generator(plan)


def test_limits_that_cannot_be(plan: Path) -> None:
    path = engine_file_path(plan)
    value = json.loads(path.read_text())
    assert value["plan"]["limits"] == asdict(LIMITS)
    value["plan"]["limits"]["max_rows"] = 0
    path.write_text(json.dumps(value))
    with pytest.raises(EngineFileError, match=r"is not a valid engine\.json \(.*`\$\.plan\.limits\.max_rows`"):
        Generator(plan)


@pytest.mark.parametrize("content", [b"", b"junk", b"HTTA\x02\0\0\0\0\0\0\0junk"])
def test_kernels_that_are_none_are_refused(plan: Path, content: bytes) -> None:
    path = plan.with_name("engine.kernels.bin")
    path.write_bytes(content or b"\0")
    about = read_engine_file(plan)
    assert about.plan is not None
    replace(about, plan=replace(about.plan, kernels=FileRecord.of(path))).write(engine_file_path(plan))
    with pytest.raises(EngineFileError, match=r"engine\.kernels\.bin is not a valid kernels\.bin \(.*; export the eng"):
        Generator(plan)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9},
    "min-p": {"temperature": 1.3, "min_p": 0.05},
    "top-k": {"temperature": 0.9, "top_k": 40},
    "top-p": {"temperature": 0.9, "top_p": 0.9},
    "both": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "whole logits": {"temperature": 0.7, "repetition_penalty": 1.2, "logprobs": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_choices_on_the_gpu_are_the_hosts(plan: Path, tiny_engine: Path, options: dict[str, Any]) -> None:
    sampling = Sampling(**options, seed=5 if options else None)
    on_gpu = Generator(plan)
    make_earlier(plan)
    on_host = Generator(plan)
    expected = Generator(tiny_engine, threads=1, adapt=False)
    for prompt in ("Hello", "x" * 40):
        found, *others = (
            one.generate(prompt, max_new_tokens=60, sampling=sampling) for one in (on_gpu, on_host, expected)
        )
        plain = on_gpu.generate(prompt, max_new_tokens=60, sampling=sampling, speculate=False)
        assert [other.tokens for other in (plain, *others)] == [found.tokens] * 3
        assert found.steps == others[0].steps
        assert found.log_probabilities == others[0].log_probabilities
    assert [choices_of(one) is not None for one in (on_gpu, on_host)] == [True, False]


def test_a_step_fetches_a_choice_and_no_logits(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use_gpu(plan, monkeypatch)
    generator = Generator(plan)
    vocab = generator.about.dims.vocab_size
    found = generator.generate("Hello", max_new_tokens=50, speculate=False)
    chunks = -(-found.prompt_tokens // generator.about.prompt_chunk)
    assert driver.downloaded == 4 * answer_words(TOP_ROOM) * (found.steps + chunks - 1)
    make_earlier(plan)
    driver = use_gpu(plan, monkeypatch)
    earlier = Generator(plan).generate("Hello", max_new_tokens=50, speculate=False)
    assert earlier.tokens == found.tokens
    assert driver.downloaded == 4 * vocab * (found.steps + chunks - 1)


def make_earlier(plan: Path) -> None:
    """Let the plan be of a release without kernels for choices."""
    about = read_engine_file(plan)
    path = plan.with_name("engine.kernels.bin")
    path.write_bytes(kernels_of(about, with_choices=False))
    rewrite(plan, kernels=FileRecord.of(path))


def choices_of(generator: Generator) -> Any:
    assert isinstance(generator.engine, TensorRTEngine)
    return generator.engine._choices
