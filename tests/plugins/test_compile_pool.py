"""Kernels compiled beside this process: the same ones, as many as can be launched, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytest.importorskip("triton")

from plugins.binaries import COLLECT, COMBINE, COMMIT, PEAK, Kernel, Variant
from plugins.compile_pool import CompilationError, compile_all
from plugins.specialisations import Specialisation, of_commit

# Those that take the least time.
FEW = [
    *of_commit("float16", 16, (80, 90)),
    Specialisation(COMBINE, 80, "bfloat16", 16),
    Specialisation(PEAK, 80, vocab_size=100),
]
LONG = Specialisation(Variant(64, True), 80, "float16", 256)


@pytest.fixture(autouse=True)
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's cache, and a folder for temporary files, of this test alone."""
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return cache


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[Specialisation, Kernel]:
    """`FEW` compiled one after the other, in a process that compiles nothing else."""
    code = (
        "import pickle, sys\n"
        "from plugins.compile import compile_one\n"
        "few = pickle.load(sys.stdin.buffer)\n"
        "sys.stdout.buffer.write(pickle.dumps({one: compile_one(one) for one in few}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(FEW),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("one by one"))},
        capture_output=True,
        check=True,
    )
    return pickle.loads(done.stdout)


@pytest.fixture
def started() -> Callable[[], list[psutil.Process]]:
    """The processes that this test has started and that are there; of tests before, some may be there as well."""
    earlier = set(psutil.Process().children())
    return lambda: [child for child in psutil.Process().children() if child not in earlier]


@pytest.fixture
def left(cold: Path, started: Callable[[], list[psutil.Process]]) -> Callable[[], list[str]]:
    """What is left of work that was not finished: temporary files, processes, files in the cache."""

    def found() -> list[str]:
        temporary = [path.name for path in Path(tempfile.gettempdir()).iterdir()]
        return [*temporary, *map(str, started()), *map(str, cold.glob("*/tmp.*"))]

    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_kernels_are_the_same_however_many_processes_compile_them(
    workers: int,
    one_by_one: dict[Specialisation, Kernel],
    left: Callable[[], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Not what Python would find where the user is.
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "plugins").mkdir(parents=True)
    (elsewhere / "plugins" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(elsewhere)
    told: list[tuple[int, int]] = []
    found = compile_all([*FEW, FEW[0]], workers, lambda done, total: told.append((done, total)))
    assert told == [(done, 4) for done in range(5)]
    assert found == one_by_one
    assert left() == []


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            Specialisation(COMMIT, 999, "float16", 16),
            r"^the copy of accepted rows, head size 16, SM 99\.9: PTXASError: .*'sm_999a' is not defined[^\n]*$",
        ),
        (Specialisation(COLLECT, 80, vocab_size=-1), r"^choices among -1 tokens, SM 8\.0: [^\n]+$"),
    ],
)
def test_a_kernel_that_cannot_be_compiled_is_one_error(
    left: Callable[[], list[str]], odd: Specialisation, message: str
) -> None:
    with pytest.raises(CompilationError, match=message):
        compile_all([*FEW, odd], 2)
    assert left() == []


def test_a_process_that_is_killed_is_one_error(
    left: Callable[[], list[str]], started: Callable[[], list[psutil.Process]]
) -> None:
    def kill(done: int, total: int) -> None:
        if done == 1:
            for child in started():
                child.kill()

    with pytest.raises(CompilationError, match=r": the compiler was killed with SIGKILL, likely for want of memory$"):
        compile_all(FEW, 1, kill)
    assert left() == []


def test_an_interruption_ends_all_processes_and_leaves_nothing_half_written(
    cold: Path, left: Callable[[], list[str]], started: Callable[[], list[psutil.Process]]
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 1:
            # As where a process is ended while it writes: the first one, whose kernel is the longest.
            busy = min(started(), key=lambda child: child.create_time())
            (cold / "entry" / f"tmp.pid_{busy.pid}_1").mkdir(parents=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_all([LONG, *FEW[:1]], 2, interrupt)
    assert left() == []
    # What was finished is kept, whole: nothing is compiled again.
    compiled = {path: path.stat().st_mtime_ns for path in cold.glob("*/*.cubin")}
    assert len(compiled) == 1
    compile_all(FEW[:1], 1)
    assert {path: path.stat().st_mtime_ns for path in cold.glob("*/*.cubin")} == compiled


def test_nothing_to_compile_takes_no_process() -> None:
    assert compile_all([], 4) == {}
