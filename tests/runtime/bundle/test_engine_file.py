"""An engine's files: what is missing, damaged, or not what its description says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import EngineFileError, Generator, InputError, TreeSizes
from runtime.bundle.engine_file import FORMAT_VERSION, read_engine_file
from tests.runtime.conftest import change


def test_the_identity_is_of_all_that_a_tuning_depends_on(tiny_engine: Path) -> None:
    about = read_engine_file(tiny_engine)
    assert about.weights is not None
    assert about.cpu_graph is not None
    other = replace(about.graph, sha256="0" * 64)
    found = {
        about.identity,
        replace(about, graph=other).identity,
        replace(about, cpu_graph=other).identity,
        replace(about, weights=other).identity,
        replace(about, correction=other).identity,
        replace(about, tree=TreeSizes(5, about.tree.pseudo_rows)).identity,
        replace(about, transfer={**about.transfer, "sha256": "0" * 64}).identity,
    }
    assert len(found) == 7
    assert replace(about, parity={}, versions={}).identity == read_engine_file(tiny_engine).identity == about.identity


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineFileError, match="make one with: ht-export"):
        Generator(tmp_path / "engine.onnx")


@pytest.mark.parametrize("threads", [0, -1, 10**10, 2.5, "2", True])
def test_threads_out_of_range(tiny_engine: Path, threads: Any) -> None:
    with pytest.raises(InputError, match=r"threads must be (at least 1|at most 1024|a whole number)"):
        Generator(tiny_engine, threads=threads)


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_that_is_no_file(path: str) -> None:
    with pytest.raises(EngineFileError, match="no engine at"):
        Generator(path)


@pytest.mark.parametrize("name", ["engine.json", "engine.cpu.onnx", "engine.onnx.data", "engine.tokenizer.json"])
def test_a_missing_file_is_named(engine_copy: Path, name: str) -> None:
    (engine_copy.parent / name).unlink()
    with pytest.raises(EngineFileError, match=f"{name} is missing"):
        Generator(engine_copy)


@pytest.mark.parametrize("name", ["engine.onnx", "engine.cpu.onnx", "engine.onnx.data", "engine.tokenizer.json"])
def test_a_truncated_file_is_named(engine_copy: Path, name: str) -> None:
    path = engine_copy.parent / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineFileError, match=rf"{name} has \d+ bytes where \d+ are expected; it is incomplete"):
        Generator(engine_copy)


@pytest.mark.parametrize("name", ["engine.cpu.onnx", "engine.onnx.data"])
def test_a_file_of_the_right_size_with_other_contents_is_named(engine_copy: Path, name: str) -> None:
    path = engine_copy.parent / name
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineFileError, match=f"{name} is damaged: its SHA-256"):
        Generator(engine_copy)


def test_a_newer_description_is_refused(engine_copy: Path) -> None:
    newer = FORMAT_VERSION + 1
    change(engine_copy, version=newer)
    with pytest.raises(EngineFileError, match=f"is of version {newer}, and this runtime reads version {newer - 1}; up"):
        Generator(engine_copy)


def test_a_description_of_something_else_is_refused(engine_copy: Path) -> None:
    change(engine_copy, format="other")
    with pytest.raises(EngineFileError, match="does not describe a hidden-transfer engine"):
        Generator(engine_copy)


def test_a_description_that_lacks_something_is_refused(engine_copy: Path) -> None:
    path = engine_copy.with_suffix(".json")
    about = json.loads(path.read_text())
    del about["tokenizer"]
    path.write_text(json.dumps(about))
    with pytest.raises(EngineFileError, match="lacks or misstates 'tokenizer'"):
        Generator(engine_copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_tokens", ["2"]),
        ("stop_tokens", "2"),
        ("stop_tokens", [-1]),
        ("stop_tokens", [True]),
        ("special_tokens", "x"),
        ("special_tokens", {"bos_token": 1}),
        ("prompt_chunk", 0),
        ("max_context", True),
        ("tree", {"tree_rows": 10**7, "pseudo_rows": [1, 1, 1]}),
    ],
)
def test_a_description_that_cannot_be_is_refused(engine_copy: Path, field: str, value: object) -> None:
    change(engine_copy, **{field: value})
    with pytest.raises(EngineFileError, match=r"engine\.json lacks or misstates"):
        Generator(engine_copy)


@pytest.mark.parametrize("field", ["head_dim", "vocab_size", "num_layers", "key_value_heads"])
def test_dimensions_that_are_no_numbers_are_refused(engine_copy: Path, field: str) -> None:
    dims = json.loads(engine_copy.with_suffix(".json").read_text())["dims"]
    change(engine_copy, dims={**dims, field: str(dims[field])})
    with pytest.raises(EngineFileError, match=rf"lacks or misstates {field} \('"):
        Generator(engine_copy)


def test_a_description_that_is_not_json_is_refused(engine_copy: Path) -> None:
    engine_copy.with_suffix(".json").write_text("{")
    with pytest.raises(EngineFileError, match="is not valid JSON"):
        Generator(engine_copy)


def test_a_renamed_engine_is_refused(engine_copy: Path) -> None:
    for suffix in (".onnx", ".json"):
        engine_copy.with_suffix(suffix).rename(engine_copy.with_name("other" + suffix))
    with pytest.raises(EngineFileError, match=r"describes engine\.onnx, not other\.onnx"):
        Generator(engine_copy.with_name("other.onnx"))


@pytest.mark.parametrize("other", [{"num_layers": 3}, {"head_dim": 16}, {"vocab_size": 265}])
def test_dimensions_that_are_not_the_graphs_are_refused(engine_copy: Path, other: dict[str, int]) -> None:
    dims = json.loads(engine_copy.with_suffix(".json").read_text())["dims"]
    # Without tables of the vocabulary's size, which would be found first.
    change(engine_copy, dims={**dims, **other}, correction=None)
    with pytest.raises(EngineFileError, match=r"does not have the graph its engine\.json describes"):
        Generator(engine_copy)
