from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ht_export.bench.settings import BenchSettings, Job
from runtime import Generator, Sampling


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven prompts of the tasks a, b, a, b, a, b and none."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows: list[dict[str, Any]] = [
        {"id": f"p{i}", "task": "ab"[i % 2], "prompt": f"Prompt number {i}{'.' * i}"} for i in range(6)
    ]
    rows.append({"id": "p6", "turns": ["Hello", "and again"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def generator(tiny_engine: Path) -> Generator:
    return Generator(tiny_engine, threads=1)


@pytest.fixture
def settings(tiny_engine: Path, prompts_file: Path, tiny_checkpoint: Path) -> BenchSettings:
    return BenchSettings(tiny_engine, prompts_file, model=str(tiny_checkpoint), max_new_tokens=20, threads=1)


@pytest.fixture
def engine_copy(tiny_engine: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_engine.parent, tmp_path / "copy")
    return tmp_path / "copy" / tiny_engine.name


def job(text: str = "Hello", **sampling: Any) -> Job:
    return Job("0", "a", text, Sampling(**sampling))
