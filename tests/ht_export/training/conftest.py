from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.progress import Progress

from ht_export.model.checkpoint import BaseModel, load_base_model
from ht_export.training.data import AnsweredPrompt, read_data
from ht_export.training.generate import DataSettings, generate_data
from runtime import Generator

SETTINGS = DataSettings(max_new_tokens=24, shard_size=4)
QUIET = Progress(disable=True)


@pytest.fixture(scope="session")
def base(tiny_checkpoint: Path) -> BaseModel:
    return load_base_model(str(tiny_checkpoint))


@pytest.fixture(scope="session")
def answering(tiny_engine: Path) -> Iterator[Generator]:
    """An engine of `base` that answers prompts."""
    with Generator(tiny_engine, threads=1, adapt=False) as generator:
        yield generator


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"id": i, "task": "ab"[i % 2], "prompt": f"Prompt number {i * 37 % 11}{'.' * i}"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory, answering: Generator, prompts_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate_data(answering, prompts_file, folder, SETTINGS, QUIET)
    return folder


@pytest.fixture(scope="session")
def held_out_folder(tmp_path_factory: pytest.TempPathFactory, answering: Generator) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    prompts = folder / "prompts.jsonl"
    rows = [{"id": i, "task": "ab"[i % 2], "prompt": f"Held out, number {i}{'!' * i}"} for i in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate_data(answering, prompts, folder / "data", SETTINGS, QUIET)
    return folder / "data"


@pytest.fixture(scope="session")
def sequences(base: BaseModel, data_folder: Path) -> list[AnsweredPrompt]:
    return read_data(data_folder, base, 4)
