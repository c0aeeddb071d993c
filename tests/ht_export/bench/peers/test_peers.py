"""`ht-bench peers`: measured with a tiny model, continued, and with peers that fail; and each adapter whose library is
there.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ht_export.bench import cli
from ht_export.bench.peers import gguf_files, measure
from ht_export.bench.peers.kinds import FLOAT32, KINDS, PRECISIONS, server
from ht_export.bench.peers.measure import Contestant, OutOfTimeError, Work
from ht_export.bench.peers.models import Described, Forms
from ht_export.bench.peers.process import command_of
from ht_export.bench.peers.results import Results, opened
from ht_export.bench.peers.table import to_markdown
from runtime.errors import InputError
from tests.ht_export.bench.peers import scripted

# Pythons of peers that are in other environments, as for --python: "openvino=/path/to/python,...".
ELSEWHERE = dict(one.split("=", 1) for one in os.environ.get("HT_PEERS", "").split(",") if one)
LIBRARIES = {"llama_cpp": "llama_cpp", "openvino": "openvino_genai", "onnxruntime_genai": "onnxruntime_genai"}
CONDITIONS: dict[str, Any] = {
    "date": "2026-01-01",
    "commit": "0",
    "model": "tiny",
    "device": "a CPU",
    "threads": 1,
    "prompts": {"file": "x", "count": 2},
    "max_new_tokens": 3,
    "rounds": 2,
}


def run(*arguments: object) -> int:
    return cli.main(["peers", *map(str, arguments)])


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """What scripted peers are asked; the name of one is its script."""
    monkeypatch.setattr(measure, "command_of", lambda name, python: scripted.command(name))
    forms = Forms("tiny", tmp_path, Described("tiny", "0", [], 100, 300), None, None)
    return Work([[4], [9]], [[30]], forms, 1, 3, [1, 2], 2, 20.0, None, 1, str)


def contestant(script: str, name: str | None = None) -> Contestant:
    # Whose model is what there is: none is made.
    return Contestant(name or script, replace(server(script), worker=script), FLOAT32, given=Path(__file__))


def test_all_are_measured_in_turns_with_their_best_settings(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(None, CONDITIONS)
    measure.reference(work, results, None)
    measure.measure(work, results, [contestant("never"), contestant("never:", "other")])
    assert results.reference == [[7, 8, 9], [12, 13, 14]]
    order = [(row.round, row.clients, row.entry) for row in results.rows]
    assert order[:2] == [(0, 1, "never"), (0, 1, "other")]
    assert order[4:6] == [(1, 1, "other"), (1, 1, "never")]
    assert all(row.setting == {"faster": 1} for row in results.rows)
    assert all(answer.differs_at is None for row in results.rows for answer in row.answers)
    table = to_markdown(results)
    assert "2 clients at once" in table
    assert "4 of 4, exact" in table
    assert "as it is: 1.5 tokens/s; **faster 1: 3.0 tokens/s**" in table
    assert "never, 1 client: faster 1: 3.0 tokens/s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("start:dies", "its process ended with status 3: Segmentation fault, as it were"),
        ("start:missing", "has no the_library; install it with: pip install"),
        ("choices:choices", "it told no settings to choose from"),
        ("open:dies", "its process ended with status 3"),
        ("open:hangs", "did not answer within 2 s"),
        ("open:empty", "something else than what it has opened"),
        ("answer:rubbish", "what is no answer"),
        ("answer:few", "something else than the answers to the prompts"),
        ("answer:negative", "something else than the answers to the prompts"),
        ("answer:error", "ValueError: it does not like this"),
    ],
)
def test_a_peer_that_fails_is_one_line_and_the_others_go_on(
    script: str, told: str, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = 2.0 if script.endswith("hangs") else work.limit
    work = replace(work, limit=limit, clients=[1], rounds=1)
    results = Results(None, CONDITIONS, reference=[[7, 8, 9], [12, 13, 14]])
    measure.measure(work, results, [contestant(script), contestant("never")])
    assert [row.entry for row in results.rows] == ["never"]
    assert len(results.left_out) + len(results.failed) == 1
    [line] = results.left_out + results.failed
    assert told in line
    assert line in capsys.readouterr().err
    assert line in to_markdown(results)


def test_what_was_measured_is_not_measured_again(work: Work, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    work = replace(work, clients=[1], seconds=0.0)
    results = opened(path, CONDITIONS)
    measure.reference(work, results, None)
    with pytest.raises(OutOfTimeError):
        measure.measure(work, results, [contestant("never")])
    again = opened(path, {**CONDITIONS, "date": "2026-01-02"})
    assert again.reference == results.reference
    measure.measure(replace(work, seconds=None), again, [contestant("never")])
    assert len(again.rows) == 2
    # A worker that cannot answer is not asked.
    third = opened(path, CONDITIONS)
    assert third.conditions["continued"] == [{"date": "2026-01-02", "commit": "0"}]
    measure.measure(replace(work, seconds=None), third, [contestant("answer:dies", "never")])
    assert third.rows == again.rows
    assert not third.failed
    with pytest.raises(InputError, match="other conditions: threads is 1 there and 2 now"):
        opened(path, {**CONDITIONS, "threads": 2})


def test_another_version_of_a_peer_does_not_continue_its_measurements(work: Work) -> None:
    results = Results(None, CONDITIONS, reference=[[7, 8, 9], [12, 13, 14]])
    work = replace(work, clients=[1], rounds=1)
    measure.measure(work, results, [contestant("never")])
    results.entries["never"] = replace(results.entries["never"], version="scripted 0")
    measure.measure(replace(work, rounds=2), results, [contestant("never")])
    [line] = results.failed
    assert "it is scripted 1, and was measured as scripted 0 before" in line


def test_a_tiny_model_is_measured_beside_transformers(
    tiny_engine: Path, tiny_checkpoint: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "peers.json", tmp_path / "peers.png"
    options = ["--prompts", prompts_file, "--work", tmp_path / "work", "--json", out, "--plot", plot, "--count", 3]
    options += ["--peers", "ours,transformers", "--precisions", FLOAT32, "--engine", tiny_engine, "--threads", 1]
    options += ["--max-new-tokens", 12, "--rounds", 1, "--clients", 3, "--trial", 1]
    assert run(tiny_checkpoint, *options) == 0
    found = json.loads(out.read_text())
    assert found["complete"]
    assert not found["left_out"] + found["failed"]
    assert {(row["entry"], row["clients"]) for row in found["rows"]} == {
        (f"{peer} float32", 3) for peer in ("ours", "transformers")
    }
    for row in found["rows"]:
        assert all(answer["differs_at"] is None for answer in row["answers"])
        assert row["load_s"] > 0
        assert row["peak_bytes"] > 1 << 20
    assert all(entry["file_bytes"] > 0 for entry in found["entries"].values())
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "3 clients at once" in table
    assert "3 of 3, exact" in table


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--peers", "lama"], "--peers: there is no 'lama'; choose from ours, llama_cpp"),
        (["--precisions", "int8"], "--precisions: there is no 'int8'; choose from float32, 16bit"),
        (["--python", "ollama=x"], "--python: there is no 'ollama'"),
        (["--url", "ours=http://x"], "the name is taken"),
        (["--clients", "0"], "--clients must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--limit", "0"], "--limit must be from 0.1"),
    ],
)
def test_options_out_of_range_are_refused_at_once(
    options: list[str], told: str, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("no-such-model", "--prompts", prompts_file, "--work", tmp_path, *options) == 1
    assert told in capsys.readouterr().err


@pytest.mark.smollm2
@pytest.mark.parametrize(
    "precision", [FLOAT32, *(pytest.param(name, marks=pytest.mark.long) for name in PRECISIONS if name != FLOAT32)]
)
def test_a_gguf_file_of_another_precision_has_the_same_model(precision: str, tmp_path: Path) -> None:
    from ht_export.model.checkpoint import load_base_model
    from ht_export.model.known import KNOWN_MODELS
    from ht_export.model.locate import locate
    from ht_export.model.shipped import PRETRAINED
    from ht_export.model.transfer import load_transfer_layers

    location = locate("smollm2-135m")
    source = location.find(str(location.gguf_file))
    assert source is not None
    # It has 4 bits itself.
    assert gguf_files.has_precision(source, precision) == (precision == "4bit")
    out = tmp_path / "model.gguf"
    gguf_files.convert(source, precision, out)
    assert gguf_files.has_precision(out, precision)
    if precision == FLOAT32:
        # The shipped transfer layers say what weights they are for.
        _, about = load_transfer_layers(PRETRAINED / KNOWN_MODELS["smollm2-135m"].transfer)
        assert load_base_model(str(out)).weights_sha256 == about.base_model["weights_sha256"]


@pytest.mark.smollm2
@pytest.mark.parametrize("peer", LIBRARIES)
def test_an_adapter_has_the_float32_models_texts(peer: str, prompts_file: Path, tmp_path: Path) -> None:
    if peer not in ELSEWHERE and importlib.util.find_spec(LIBRARIES[peer]) is None:
        pytest.skip(f"{LIBRARIES[peer]} is not installed: {KINDS[peer].install}, or HT_PEERS={peer}=PYTHON")
    out = tmp_path / "peers.json"
    options = ["--prompts", prompts_file, "--work", tmp_path / "work", "--json", out, "--count", 3, "--peers", peer]
    options += ["--python", f"{peer}={ELSEWHERE[peer]}"] if peer in ELSEWHERE else []
    options += ["--precisions", "float32,8bit", "--max-new-tokens", 12, "--rounds", 1, "--clients", "1,3", "--trial", 1]
    assert run("smollm2-135m", *options, "--threads", 1) == 0
    found = json.loads(out.read_text())
    assert not found["failed"]
    rows = {(row["entry"], row["clients"]): row for row in found["rows"]}
    # OpenVINO's float32 files need optimum-intel, and are left out without it.
    for clients in (1, 3):
        assert (f"{peer} 8bit", clients) in rows
        if row := rows.get((f"{peer} float32", clients)):
            assert all(answer["differs_at"] is None for answer in row["answers"])


def test_a_worker_is_found_by_its_name() -> None:
    for kind in KINDS.values():
        assert Path(command_of(kind.worker, "python")[2]).with_name("workers").joinpath(f"{kind.worker}.py").is_file()
