from __future__ import annotations

import copy
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ht_export.export import ExportSettings, export
from ht_export.model.checkpoint import load_base_model
from ht_export.model.transfer import TransferFile, save_transfer_layers
from ht_export.tensorrt.graph import write_for_tensorrt
from ht_export.tensorrt.planner import PlanSettings
from ht_export.verify.passes import record
from runtime.bundle.engine_file import read_engine_file
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.conftest import random_transfer, save_checkpoint, shared, tiny_llama

PLAN = PlanSettings(runtime="tensorrt-rtx", max_rows=8, capabilities=((8, 0),))


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with heads of 64, which fused attention asks for."""
    return shared(tmp_path_factory, "wide", lambda folder: save_checkpoint(folder, tiny_llama(head_dim=64)))


@pytest.fixture(scope="session")
def wide_transfer(tmp_path_factory: pytest.TempPathFactory, wide_checkpoint: Path) -> Path:
    def build(folder: Path) -> None:
        about = TransferFile(load_base_model(str(wide_checkpoint)).identity())
        save_transfer_layers(folder / "wide.safetensors", random_transfer((3, 1, 3)), about)

    return shared(tmp_path_factory, "wide-transfer", build) / "wide.safetensors"


def build(checkpoint: Path, transfer: Path, out: Path, plan: PlanSettings = PLAN, precision: str = "fp16") -> None:
    """Export a plan of the tiny model."""
    settings = ExportSettings(tree_rows=4, chunk=16, precision=precision, max_context=128)
    export(str(checkpoint), transfer, out, settings, lambda _: nullcontext(lambda _: None), plan)


@pytest.fixture(scope="session", params=["tiny_engine", "half_engine"], ids=["fp32", "fp16"])
def graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported graph, engine.onnx, and that graph with its plugin marked, tensorrt.onnx."""
    folder = tmp_path_factory.mktemp("graphs")
    shutil.copytree(request.getfixturevalue(request.param).parent, folder, dirs_exist_ok=True)
    dims = read_engine_file(folder / "engine.onnx").dims
    write_for_tensorrt(folder / "engine.onnx", folder / "tensorrt.onnx", dims, plugin=True, decomposable=False)
    return folder


@pytest.fixture(scope="session")
def feeds(graphs: Path) -> dict[str, dict[str, np.ndarray]]:
    """The graph's inputs in each case of the parity check."""
    engine = OnnxRuntimeEngine(graphs / "engine.onnx", read_engine_file(graphs / "engine.onnx").dims)
    session, fed = engine._session, []

    def run(names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        fed.append(copy.deepcopy(feed))
        return session.run(names, feed)

    engine._session = SimpleNamespace(run=run)
    return {one.case: feed for one, feed in zip(record(engine), fed, strict=True)}
