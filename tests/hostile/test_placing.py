"""Engines are replaced at one instant: whatever is killed, raced or truncated, one of them loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import Generator
from runtime.bundle.engine_file import read_engine_file
from runtime.bundle.reading import read_bundle
from tests.hostile.killed import install

PROMPT = "Tell me about tea."


@pytest.fixture
def other_engine(half_engine: Path) -> Path:
    """An engine of the name of the tiny one, with other files, and one fewer."""
    return half_engine


@pytest.mark.parametrize("replaces", [True, False])
def test_an_engine_loads_after_a_kill_at_any_operation(
    tiny_engine: Path, other_engine: Path, tmp_path: Path, replaces: bool
) -> None:
    old = tiny_engine.parent
    if not replaces:
        old = tmp_path / "empty"
        old.mkdir()
    command = [sys.executable, "-m", "tests.hostile.killed", old, other_engine.parent, tmp_path / "work"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    before = "old" if replaces else "none"
    whole = [operation for operation, *_ in results]
    assert len(whole) > 40
    assert whole[-1] is None
    changes = 0
    last = before
    for operation, first, again, left in results:
        assert first in (before, "new"), (operation, first)
        assert again == first, operation
        assert not left, operation
        changes += first != last
        last = first
    # The operation that decides is one.
    assert (changes, last) == (1, "new")


def test_installs_race_and_every_read_is_of_one_engine(tiny_engine: Path, other_engine: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine.onnx"
    sources = (tiny_engine, other_engine)
    install(tiny_engine, engine)
    command = [sys.executable, "-m", "tests.hostile.racing"]
    racers = [subprocess.Popen([*command, str(new), str(engine), "50"], stdout=subprocess.PIPE) for new in sources]
    known = {read_engine_file(new).identity for new in sources}
    seen = set()
    while any(racer.poll() is None for racer in racers):
        # Every file is read and its hash checked.
        seen.add(read_bundle(engine).about.identity)
    assert [racer.communicate()[0].strip() for racer in racers] == [b"50", b"50"]
    # One of them may have been in place at every read.
    assert seen
    assert seen <= known
    assert read_bundle(engine).about.identity in known
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_generator_decodes_while_its_engine_is_replaced(
    tiny_engine: Path, other_engine: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "engine.onnx"
    install(tiny_engine, engine)
    expected = {
        read_engine_file(new).identity: Generator(new, threads=1, adapt=False)
        .generate(PROMPT, max_new_tokens=20)
        .tokens
        for new in (tiny_engine, other_engine)
    }
    generator = Generator(engine, threads=1, adapt=False)
    for number in range(50):
        chunks = generator.stream(PROMPT, max_new_tokens=20)
        tokens = next(chunks).tokens
        install((other_engine, tiny_engine)[number % 2], engine)
        for chunk in chunks:
            tokens = tokens + chunk.tokens
        assert tokens == expected[generator.about.identity]
        if number % 5 == 4:
            generator = Generator(engine, threads=1, adapt=False)
            assert generator.generate(PROMPT, max_new_tokens=20).tokens == expected[generator.about.identity]


def test_a_generator_survives_what_others_do_to_its_files(engine_copy: Path) -> None:
    command = [sys.executable, "-m", "tests.hostile.truncated", str(engine_copy), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    before, *after = json.loads(done.stdout)
    assert after == [before, before]
