"""ONNX Runtime on a simulated GPU: the session is the CPU's, and reads and writes at the addresses it is bound to."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from runtime import Generator, InputError, TreeSizes
from runtime.bundle.engine_file import read_engine_file
from runtime.engines import onnxruntime_cuda
from runtime.engines.onnxruntime_cuda import PROVIDER
from runtime.engines.protocol import Slot
from runtime.rows import prompt_rows

pytest.importorskip("cuda.bindings")

from tests.passes import run_one
from tests.runtime.engines.gpu_engines import use_gpu_of_onnxruntime


@pytest.fixture
def engine(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny engine, with a simulated GPU to run on."""
    use_gpu_of_onnxruntime(tiny_engine, monkeypatch)
    return tiny_engine


@pytest.mark.parametrize("prompt", ["a", "Hello there", "x" * 40])
def test_text_is_that_of_the_cpu(engine: Path, prompt: str) -> None:
    tree = read_engine_file(engine).tree
    expected = Generator(engine, threads=1).generate(prompt, max_new_tokens=100, tree=tree)
    generator = Generator(engine, device="cuda")
    for _ in range(2):
        found = generator.generate(prompt, max_new_tokens=100, tree=tree)
        assert (found.tokens, found.steps) == (expected.tokens, expected.steps)
    assert generator.generate(prompt, max_new_tokens=100, speculate=False).tokens == expected.tokens


def test_drafts_with_a_head_of_their_own(draft_head_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_gpu_of_onnxruntime(draft_head_engine, monkeypatch)
    tree = read_engine_file(draft_head_engine).tree
    cpu, gpu = Generator(draft_head_engine, threads=1), Generator(draft_head_engine, device="cuda")
    prompts = ["a", "Hello there", "x" * 40]
    for prompt in prompts:
        expected, found = (one.generate(prompt, max_new_tokens=80, tree=tree) for one in (cpu, gpu))
        assert (found.tokens, found.steps) == (expected.tokens, expected.steps)
    together, alone = gpu.generate(prompts, max_new_tokens=40, tree=tree), cpu.generate(prompts, max_new_tokens=40)
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def test_more_rows_than_there_are_buffers_for(engine: Path) -> None:
    generator = Generator(engine, device="cuda")
    with pytest.raises(InputError, match="a pass of 65 rows; this engine takes at most 64, use fewer"):
        generator.generate("Hello there", tree=TreeSizes(65, (65, 65, 65)), max_new_tokens=50)


def test_kept_rows_come_back_and_a_request_that_failed_commits_nothing(engine: Path) -> None:
    opened = Generator(engine, device="cuda").engine
    join_order = opened.dims.join_order

    def committed(tokens: list[int]) -> Slot:
        slot = opened.new_slot()
        result = run_one(opened, prompt_rows(tokens, join_order, 0), slot)
        opened.commit(result, [range(len(tokens))])
        return slot

    def logits_after(slot: Slot) -> np.ndarray:
        return np.array(run_one(opened, prompt_rows([11], join_order, slot.length), slot).outputs(0).logits[0])

    expected = logits_after(committed([3, 4, 5]))
    kept = opened.keep(committed([3, 4, 5, 6, 7]), 4)
    committed([9] * 14)
    slot = opened.new_slot()
    opened.copy(kept, slot, 3)
    np.testing.assert_array_equal(logits_after(slot), expected)
    opened.commit(run_one(opened, prompt_rows([8, 8], join_order, 3), slot), [()])
    assert slot.length == 3
    np.testing.assert_array_equal(logits_after(slot), expected)


def test_an_onnx_runtime_for_the_cpu_only(tiny_engine: Path) -> None:
    if PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is for GPUs")
    with pytest.raises(InputError, match=r"for the CPU only; .*pip install 'hidden-transfer\[cuda\]'"):
        Generator(tiny_engine, device="cuda")


def test_libraries_that_do_not_load(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "open_session", lambda graph, *_: onnxruntime_on_cpu(graph.path))
    with pytest.raises(InputError, match="its CUDA libraries did not load; install CUDA 12 and cuDNN 9"):
        Generator(engine, device="cuda")


def onnxruntime_on_cpu(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_a_gpu_that_is_not_there(engine: Path) -> None:
    with pytest.raises(InputError, match="there is no GPU 1; this machine has 1"):
        Generator(engine, device="cuda:1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be cpu, cuda or a GPU's number such as cuda:1, not 'tpu'"),
        ({"device": "cuda:-1"}, "device must be cpu, cuda or a GPU's number such as cuda:1, not 'cuda:-1'"),
        ({"device": 1}, "device must be cpu, cuda or a GPU's number such as cuda:1, not 1"),
        ({"device": "cuda", "threads": 2}, "threads is for engines on the CPU"),
    ],
)
def test_options_that_cannot_be(tiny_engine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Generator(tiny_engine, **options)
