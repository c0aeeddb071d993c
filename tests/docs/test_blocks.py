"""Blocks of Python compile, and run with a tiny engine; JSON and YAML can be read; samples are what is printed."""

import ast
import asyncio
import inspect
import json
import types
from contextlib import nullcontext
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from ht_export.bench.settings import SPECULATIVE
from ht_export.bench.table import _check_lines
from ht_export.export import export
from ht_export.parity.report import Report
from ht_export.parity.stages import Comparison, Deviation
from ht_export.settings import ExportSettings
from tests.conftest import own_copy, save_checkpoint, shared, tiny_llama
from tests.docs.pages import Block, blocks, pages

PYTHON = [page for page in pages() if any(block.language == "python" for block in blocks(page))]
RUN = [page for page in PYTHON if any(block.language == "python" and not block.not_run for block in blocks(page))]


@pytest.fixture(scope="module")
def documented_engine(tmp_path_factory: pytest.TempPathFactory, tiny_transfer: Path) -> Path:
    """The tiny Llama with room for the prompts of the documents, as `engine.onnx`."""

    def build(folder: Path) -> None:
        model = tiny_llama(max_position_embeddings=768)
        checkpoint = save_checkpoint(folder / "model", model)
        settings = ExportSettings(tree_rows=6, pseudo_rows=(6, 4, 2), chunk=64)
        export(
            str(checkpoint),
            tiny_transfer,
            folder / "engine.onnx",
            settings,
            lambda _: nullcontext(lambda _: None),
        )

    return own_copy(tmp_path_factory, shared(tmp_path_factory, "documented", build)) / "engine.onnx"


@pytest.mark.parametrize("page", PYTHON)
def test_blocks_of_python_compile(page: str) -> None:
    for block in _python(page):
        _compiled(block)


@pytest.mark.parametrize("page", RUN)
def test_blocks_of_python_run_one_after_another(
    page: str, documented_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(documented_engine.parent)
    names: dict[str, Any] = {}
    try:
        for block in _python(page):
            if block.not_run is None:
                _run(block, names)
    finally:
        for value in names.values():
            if type(value).__name__ == "Generator":
                value.close()


@pytest.mark.parametrize("page", pages())
def test_blocks_of_json_and_yaml_can_be_read(page: str) -> None:
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            pytest.importorskip("yaml").safe_load(block.text)


def test_every_block_says_its_language_or_is_a_drawing() -> None:
    known = {"bash", "python", "json", "yaml", "text", ""}
    for page in pages():
        for block in blocks(page):
            assert block.language in known, f"{block}: {block.language}"


def test_reports_of_divergence_read_as_the_exactness_page_shows_them() -> None:
    samples = [block.text.strip() for block in blocks("docs/exactness.md") if block.language == "text"]
    differences = [
        {"id": "gsm8k-17", "seed": None, "position": 41, "gap": 3.1e-6, "wrong": False},
        {"id": "vicuna-3", "seed": None, "position": 12, "gap": 0.21, "wrong": True},
    ]
    found = {SPECULATIVE: {"answers": 30, "identical": 28, "wrong": 1, "differences": differences}}
    assert "\n".join(_check_lines(found)) == samples[0]
    deviation = Deviation("first part of the prompt", "keys", 12, 0.4, 0.01, 3.1e-2)
    stage = Comparison("ONNX Runtime", "PyTorch reference", 1e-4, [deviation])
    assert Report({}, [stage], None).verdict() == samples[1]


def _python(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def _compiled(block: Block) -> types.CodeType:
    # Blank lines in front, so that an error names the line of the page.
    source = "\n" * block.line + block.text
    if block.not_run:
        # It may be the middle of a function.
        source = "\n" * (block.line - 1) + f"async def _():\n{indent(block.text, ' ')}"
    return compile(source, block.page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


def _run(block: Block, names: dict[str, Any]) -> None:
    code = _compiled(block)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(_awaited(types.FunctionType(code, names)))
    else:
        exec(code, names)


async def _awaited(function: Any) -> None:
    await function()
