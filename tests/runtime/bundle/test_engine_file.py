"""An engine's files: what is missing, damaged, or not what its description says."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import EngineFileError, Generator, InputError, TreeSizes
from runtime.bundle.engine_file import DRAFT_HEAD_VERSION, FileRecord, read_engine_file
from runtime.files import sha256_file
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
        replace(about, dims=replace(about.dims, draft_size=9), draft_tokens=other).identity,
        replace(about, tree=TreeSizes(7, about.tree.pseudo_rows)).identity,
        replace(about, transfer={**about.transfer, "sha256": "0" * 64}).identity,
    }
    assert len(found) == 8
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


def test_a_folder_in_the_place_of_an_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineFileError, match=r"is a folder; name the engine in it, such as .*/engine\.onnx"):
        Generator(tmp_path)


@pytest.mark.parametrize("path", ["x" * 300, "x" * 5000, "a/" * 3000])
def test_a_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(EngineFileError, match=r"cannot be read \(File name too long\); check the path"):
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
    with pytest.raises(EngineFileError, match=rf"{name} is not the file that engine\.json describes: it is inc"):
        Generator(engine_copy)


@pytest.mark.parametrize("name", ["engine.cpu.onnx", "engine.onnx.data"])
def test_a_file_of_the_right_size_with_other_contents_is_named(engine_copy: Path, name: str) -> None:
    path = engine_copy.parent / name
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(EngineFileError, match=rf"{name} is not the file that engine\.json describes: it is inc"):
        Generator(engine_copy)


@pytest.mark.parametrize("contents", [False, True])
@pytest.mark.parametrize("size", [7, 8])
def test_nothing_is_told_of_a_file_that_is_another(tmp_path: Path, size: int, contents: bool) -> None:
    other = tmp_path / "secret"
    other.write_bytes(b"password"[:size])
    (tmp_path / "engine.onnx").symlink_to(other)
    record = FileRecord("engine.onnx", 8, "0" * 64)
    if size == record.bytes and not contents:
        with record.open(tmp_path / "engine.onnx", contents=False) as file:
            assert file.read() == b"password"
        return
    with pytest.raises(EngineFileError) as raised:
        record.open(tmp_path / "engine.onnx", contents=contents)
    told = str(raised.value).replace(str(tmp_path), "")
    assert not any(character.isdigit() for character in told)
    assert not any(sha256_file(other)[:length] in told for length in (8, 12))


def test_a_link_is_followed_when_what_it_leads_to_is_the_file(engine_copy: Path, tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("blobs")
    for name in ("engine.tokenizer.json", "engine.chat_template.jinja", "engine.correction.npy"):
        path = engine_copy.with_name(name)
        if path.exists():
            path.rename(elsewhere / name)
            path.symlink_to(elsewhere / name)
    assert Generator(engine_copy, adapt=False).generate("Hello", max_new_tokens=3).tokens


@pytest.mark.parametrize("name", ["engine.tokenizer.json", "engine.onnx"])
def test_a_file_that_may_not_be_read_is_named(engine_copy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EngineFileError, match=rf"{name} .*Permission denied"):
        Generator(engine_copy)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../engine.onnx", "/etc/passwd", "a\\b", "a\0b", "a\nb", "x" * 256, "\u00e9" * 128]
)
def test_a_record_names_a_file_beside_it(engine_copy: Path, name: str) -> None:
    about = json.loads(engine_copy.with_suffix(".json").read_text())
    change(engine_copy, tokenizer={**about["tokenizer"], "name": name})
    with pytest.raises(EngineFileError, match=r"engine\.json is not a valid engine\.json \(.* - at `\$\.tokenizer`"):
        Generator(engine_copy)


def test_a_newer_description_is_refused(engine_copy: Path) -> None:
    newer = DRAFT_HEAD_VERSION + 1
    change(engine_copy, version=newer)
    with pytest.raises(
        EngineFileError, match=f"is of version {newer}, and this runtime reads versions 4 and {newer - 1}; up"
    ):
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
    with pytest.raises(EngineFileError, match=r"is not a valid engine\.json \(.*`tokenizer`"):
        Generator(engine_copy)


SHA256 = "0" * 64
# In the place of values within values, so many that reading them or walking through them ends badly.
DEEP, FAR = "a hundred thousand", "a hundred"
RECORD = {"name": "engine.x", "bytes": 1, "sha256": SHA256}
PLAN = {
    "product": "tensorrt-rtx",
    "version": "1.7.1",
    "compute_capabilities": [[8, 0]],
    "attention": "native",
    "plugin_version": None,
    "limits": {"max_batch": 1, "max_context": 256, "max_rows": 32, "chunk": 64},
    "profiles": {},
    "kernels": RECORD,
    "build": {},
}


def nested(levels: int) -> str:
    """Return JSON: Python's own writer gives up on what is nested deeply."""
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dims", None),
        ("dims", []),
        ("precision", 32),
        ("tree", {"tree_rows": 10**7, "pseudo_rows": [1, 1, 1]}),
        ("tree", {"tree_rows": 0, "pseudo_rows": [1, 1, 1]}),
        ("tree", {"tree_rows": 4, "pseudo_rows": [1, 1]}),
        ("tree", {"tree_rows": 4, "pseudo_rows": [1, 1, -1]}),
        ("tree", {"tree_rows": 4, "pseudo_rows": [1] * 100_000}),
        ("tree", {"tree_rows": 4, "pseudo_rows": "111"}),
        # Which no request could be answered with.
        ("tree", {"tree_rows": 4, "pseudo_rows": [5, 1, 1]}),
        ("tree", {"tree_rows": 4, "pseudo_rows": [4, 0, 1]}),
        ("prompt_chunk", 0),
        ("prompt_chunk", 10**9),
        ("prompt_chunk", None),
        ("max_context", True),
        ("max_context", -5),
        ("max_context", 10**15),
        ("max_context", 10**400),
        ("max_context", 1e3),
        ("stop_tokens", ["2"]),
        ("stop_tokens", "2"),
        ("stop_tokens", 2),
        ("stop_tokens", [-1]),
        ("stop_tokens", [True]),
        ("stop_tokens", [10**30]),
        ("special_tokens", "x"),
        ("special_tokens", {"bos_token": 1}),
        ("special_tokens", {"bos_token": "\ud800"}),
        ("graph", None),
        ("graph", "engine.onnx"),
        ("graph", {**RECORD, "bytes": -1}),
        ("graph", {**RECORD, "bytes": 10**30}),
        ("graph", {**RECORD, "bytes": "1"}),
        ("graph", {**RECORD, "name": None}),
        ("graph", {**RECORD, "sha256": "0" * 63}),
        ("graph", {**RECORD, "sha256": "../../../../../../tmp/x"}),
        ("graph", {**RECORD, "sha256": SHA256 + "\n"}),
        ("weights", []),
        ("base_model", []),
        ("base_model", {"name": FAR}),
        ("transfer", "x"),
        ("transfer", {"recipe": FAR}),
        ("transfer", {"recipe": DEEP}),
        ("transfer", {"acceptance": []}),
        ("versions", {"torch": 2}),
        ("parity", None),
        ("parity", {"largest_relative_difference": float("nan")}),
        ("parity", {"largest_relative_difference": float("inf")}),
        ("parity", {"x": FAR}),
        ("plan", "x"),
        ("plan", {**PLAN, "compute_capabilities": []}),
        ("plan", {**PLAN, "compute_capabilities": [[8]]}),
        ("plan", {**PLAN, "compute_capabilities": [["8", "0"]]}),
        ("plan", {**PLAN, "attention": "other"}),
        ("plan", {**PLAN, "build": {"x": FAR}}),
        ("plan", {**PLAN, "kernels": {**RECORD, "name": "../x"}}),
        *(
            ("plan", {**PLAN, "limits": {**PLAN["limits"], name: value}})  # type: ignore[dict-item]
            for name in ("max_batch", "max_context", "max_rows", "chunk")
            for value in (0, -1, 10**9, 10**30, True, "8", None)
        ),
        ("plan", {**PLAN, "limits": {**PLAN["limits"], "max_rows": 30_000}}),  # type: ignore[dict-item]
        # Fewer than the engine's own.
        ("plan", {**PLAN, "limits": {**PLAN["limits"], "max_rows": 5}}),  # type: ignore[dict-item]
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_description_that_cannot_be_is_refused(engine_copy: Path, field: str, value: object) -> None:
    described = engine_copy.with_suffix(".json")
    about = json.loads(described.read_text())
    text = json.dumps({**about, field: value})
    described.write_text(text.replace(f'"{DEEP}"', nested(100_000)).replace(f'"{FAR}"', nested(100)))
    with pytest.raises(EngineFileError, match=r"is not a valid engine\.json( header)? \(.*; export the en") as raised:
        read_engine_file(engine_copy)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 10**9),
        ("num_layers", 0),
        ("num_layers", 2),
        ("query_heads", 10**9),
        ("key_value_heads", -1),
        ("key_value_heads", "2"),
        ("head_dim", 10**9),
        ("head_dim", "8"),
        ("hidden_size", 10**18),
        ("vocab_size", 10**9),
        ("vocab_size", 0),
        ("vocab_size", 264.0),
        ("vocab_size", None),
        ("transfer_layers", []),
        ("transfer_layers", [-1, 1, 1]),
        ("transfer_layers", [5, 1, 1]),
        ("transfer_layers", [0] * 1000),
        ("transfer_layers", "111"),
        ("dtype", "float64"),
        ("dtype", "int3"),
        ("dtype", None),
    ],
)
def test_dimensions_that_cannot_be_are_refused(engine_copy: Path, field: str, value: object) -> None:
    dims = json.loads(engine_copy.with_suffix(".json").read_text())["dims"]
    change(engine_copy, dims={**dims, field: value})
    with pytest.raises(EngineFileError, match=rf"is not a valid engine\.json \(.*(`\$\.dims(\.{field}.*)?`|{field})"):
        Generator(engine_copy)


def test_what_real_descriptions_have_is_read(engine_copy: Path) -> None:
    # Tokens beyond the vocabulary that end a text, fields of a later release, whole numbers where shares are.
    change(engine_copy, stop_tokens=[2, 10**6], later=1, versions={"torch": "2"}, parity={}, plan=None)
    about = read_engine_file(engine_copy)
    assert about.stop_tokens == (2, 10**6)
    assert Generator(engine_copy, adapt=False).generate("Hello", max_new_tokens=3).tokens


def test_a_description_is_written_as_it_was_read(engine_copy: Path) -> None:
    path = engine_copy.with_suffix(".json")
    before = path.read_bytes()
    read_engine_file(engine_copy).write(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"3", b"null", b"\xff", b"{}", b'{"format": 3}', b"[" * 100_000])
def test_a_file_that_holds_something_else_is_refused(engine_copy: Path, content: bytes) -> None:
    engine_copy.with_suffix(".json").write_bytes(content)
    with pytest.raises(EngineFileError, match=r"is not a valid engine\.json header \(.*; export the engine again"):
        Generator(engine_copy)


def test_a_description_of_any_length_is_not_read_whole(engine_copy: Path) -> None:
    with engine_copy.with_suffix(".json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(EngineFileError, match=r"it has more than \d+ bytes"):
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
