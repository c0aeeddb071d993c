"""What the process of a build and its parent tell each other."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from ht_export.tensorrt import build_process, worker
from ht_export.tensorrt.build_process import build_plan
from ht_export.tensorrt.limits import Profile
from ht_export.tensorrt.worker import REQUESTS, RESULTS, BuildRequest, BuildResult
from runtime.errors import InputError

REQUEST = BuildRequest(
    product="tensorrt-rtx",
    graph="a.onnx",
    plan="a.plan",
    result="result.json",
    capabilities=[(8, 0), (12, 0)],
    profiles=[{"input_ids": [[1, 1], [1, 4], [1, 8]]}],
    kernels=None,
    plugin_layers=3,
    timing_cache=None,
)


def test_a_request_and_a_result_are_what_was_written() -> None:
    assert REQUESTS.decode(json.dumps(asdict(REQUEST)), "here") == REQUEST
    result = BuildResult(None, 1.5, 10, 9, {"PLUGIN_V3": 3}, ["layer"], [])
    assert RESULTS.decode(json.dumps(asdict(result)), "here") == result


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"capabilities": [[8]]}, "length 2"),
        ({"profiles": [{"x": [[1.5]]}]}, "Expected `int`"),
        ({"graph": None}, "null"),
    ],
)
def test_a_request_of_something_else_is_one_error(change: dict[str, object], cause: str) -> None:
    with pytest.raises(InputError, match=f"here is not a valid request for a build .*{cause}"):
        REQUESTS.decode(json.dumps({**asdict(REQUEST), **change}), "here")


def stands_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a process that runs `code` stand in for the worker; it has the request's path as its argument."""
    started = subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        return started([sys.executable, "-S", "-c", code, command[-1]], **options)  # type: ignore[call-overload]

    # Not of the module that all share.
    monkeypatch.setattr(build_process, "subprocess", SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE))


def build_beside(folder: Path, told: list[tuple[str, int, int]]) -> BuildResult:
    product = SimpleNamespace(name="a library", version="1")
    profiles: list[Profile] = []
    return build_plan(
        product,  # type: ignore[arg-type]
        folder / "a.onnx",
        folder / "a.plan",
        profiles,
        [],
        on_phase=lambda *event: told.append(event),
    )


def test_a_worker_that_dies_while_it_tells_something_is_an_error_with_its_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events = """print('{"phase": "a", "step": 1, "steps": 2}'); print('{"phase": "b', end="", flush=True)"""
    stands_in(monkeypatch, f"import os; {events}; os.kill(os.getpid(), 9)")
    told: list[tuple[str, int, int]] = []
    with pytest.raises(InputError, match="a library 1 ended the build: it was killed with SIGKILL"):
        build_beside(tmp_path, told)
    assert told == [("a", 1, 2)]


@pytest.mark.parametrize("step", [1 << 31, -(1 << 64)])
def test_steps_that_nobody_counts_are_no_event(step: int) -> None:
    with pytest.raises(InputError, match=r"not a valid event of a build .*`\$\.step`"):
        worker.EVENTS.decode(f'{{"phase": "a", "step": {step}, "steps": 2}}', "what the build told")


@pytest.mark.parametrize("result", ['{"seconds": "1"}', "[", "[" * 5000, '{"engine_layers": [1]}'])
def test_a_result_that_is_not_whole_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: str) -> None:
    (tmp_path / "result.json").write_text(result)
    stands_in(monkeypatch, "")
    with pytest.raises(InputError, match="ended the build: it ended with status 0 and no result"):
        build_beside(tmp_path, [])


def test_a_timing_cache_has_an_end(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with path.open("wb") as file:
        # Of holes, on no disk.
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"is not a valid timing cache .*more than"):
        worker._timing_cache(None, str(path))
