"""Engines exported by earlier releases load and answer as they did, now and in later releases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from runtime import EngineFileError, Generator, Sampling
from runtime.bundle.tuning_file import read_tuning
from runtime.engines.onnxruntime_cpu import OnnxRuntimeCpuEngine
from tests.runtime.conftest import change

ENGINES = sorted((Path(__file__).parents[1] / "fixtures").glob("engine-*"))


@pytest.fixture(params=ENGINES, ids=lambda folder: folder.name)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the engine: what is measured of it is written beside it."""
    shutil.copytree(request.param, tmp_path, dirs_exist_ok=True)
    return tmp_path / "engine.onnx"


@pytest.mark.parametrize("adapt", [False, True])
def test_an_engine_of_an_earlier_release_gives_its_answers(engine: Path, adapt: bool) -> None:
    generator = Generator(engine, threads=1, adapt=adapt)
    answers = json.loads(engine.with_name("expected.json").read_text(encoding="utf-8"))["answers"]
    assert answers
    for answer in answers:
        sampling = Sampling(**answer["sampling"]) if answer["sampling"] else None
        for speculate in (True, False):
            found = generator.generate(answer["prompt"], max_new_tokens=40, sampling=sampling, speculate=speculate)
            assert (found.tokens, found.text) == (answer["tokens"], answer["text"])
            if speculate and not adapt:
                # In no more passes than then.
                assert sum(found.accepted) <= sum(answer["accepted"])


def test_the_graph_of_a_release_before_batches_takes_one_request_a_pass(engine: Path, tiny_engine: Path) -> None:
    ours, theirs = (Generator(path, threads=1, adapt=False) for path in (tiny_engine, engine))
    assert isinstance(theirs.engine, OnnxRuntimeCpuEngine)
    assert (ours.engine.max_batch > 1, theirs.engine.max_batch) == (True, 1)
    # Several at once take turns.
    prompts = [answer["prompt"] for answer in json.loads(engine.with_name("expected.json").read_text())["answers"]]
    together = [theirs.submit(prompt, max_new_tokens=15) for prompt in prompts]
    found = [request.result().tokens for request in together]
    assert found == [theirs.generate(prompt, max_new_tokens=15).tokens for prompt in prompts]


def test_what_an_earlier_release_measured_is_read(engine: Path) -> None:
    about = Generator(engine, threads=1, adapt=False).about
    tuning = read_tuning(engine, about.identity, "a CPU of the time, 1 threads", about.dims)
    assert tuning is not None
    assert about.tree in tuning.menu.sizes


def test_an_engine_of_a_release_to_come_says_what_to_do(engine: Path) -> None:
    change(engine, version=99)
    with pytest.raises(EngineFileError, match=r"is of version 99, .* update hidden-transfer, or export the engine"):
        Generator(engine)
