"""Disk space and memory that an export asks for before it begins."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ht_export import preflight
from ht_export.export import ExportSettings, export
from ht_export.preflight import WeightBytes, check_memory, check_space, weight_bytes
from ht_export.quantize.precision import STORED, STORED_IN_PLANS
from ht_export.quantize.weights import quantise
from runtime.errors import InputError
from tests.conftest import tiny_llama

# Number of the tiny engine's transfer weights, which are a large part of all.
TRANSFER_WEIGHTS = 3 * 32 * 32


@pytest.mark.parametrize("precision", list(STORED))
def test_an_onnx_engine_takes_what_is_asked_for(tiny_engine: Path, tmp_path: Path, precision: str) -> None:
    storage = STORED[precision]
    sizes = weight_bytes(tiny_llama(), torch.float32, storage, as_stored=True)
    quantise(tiny_engine, tmp_path / "engine.onnx", storage)
    taken = (tmp_path / "engine.onnx.data").stat().st_size
    # Small tensors are in the graph.
    assert 0.9 * taken < sizes.engine + TRANSFER_WEIGHTS * storage.bits / 8 < 1.1 * taken


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_weights_of_a_plan_take_what_is_asked_for(half_engine: Path, tmp_path: Path, precision: str) -> None:
    storage = STORED_IN_PLANS[precision]
    sizes = weight_bytes(tiny_llama(), torch.float16, storage, as_stored=False)
    quantise(half_engine, tmp_path / "engine.onnx", storage)
    taken = (tmp_path / "engine.onnx.data").stat().st_size
    assert 0.9 * taken < sizes.engine + TRANSFER_WEIGHTS < 1.1 * taken


def test_the_graph_has_weights_as_the_checkpoint_does_where_they_are_quantised_for_onnx() -> None:
    model = tiny_llama()
    values = model.num_parameters()
    assert weight_bytes(model, torch.float16, None, as_stored=False) == WeightBytes(2 * values)
    assert weight_bytes(model, torch.float32, STORED["int8"], as_stored=True).graph == 4 * values
    model.to(torch.bfloat16)
    assert weight_bytes(model, torch.float32, STORED["int8"], as_stored=True).graph == 2 * values
    assert weight_bytes(model, torch.float32, None, as_stored=False) == WeightBytes(4 * values)


def test_the_disk_must_have_room_for_both_where_weights_are_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1200 << 20))
    check_space(WeightBytes(1000 << 20), tmp_path / "engine.onnx")
    with pytest.raises(InputError, match="has 1200 MiB free, and the export needs about 1324 MiB"):
        check_space(WeightBytes(1000 << 20, 200 << 20), tmp_path / "engine.onnx")
    # Those that are prepared take the place of the first ones.
    with pytest.raises(InputError, match="the export needs about 1639 MiB"):
        check_space(WeightBytes(700 << 20, 100 << 20, 800 << 20), tmp_path / "engine.onnx")
    check_space(WeightBytes(400 << 20, 500 << 20, 500 << 20), tmp_path / "engine.onnx")


def test_weights_are_prepared_where_whole_rows_are_rounded() -> None:
    model = tiny_llama()
    both = {name: weight_bytes(model, torch.float32, STORED[name], as_stored=True) for name in STORED}
    assert both["int4"].prepared == 0
    tied = model.get_input_embeddings().weight.numel() * 4
    assert both["int8"].prepared == both["int8"].graph + tied


def test_memory_is_asked_for_what_is_converted_or_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 30))
    check_memory(tiny_llama(), 0)
    with pytest.raises(InputError, match="needs about 2324 MiB of memory besides the model, and 2048 MiB are free"):
        check_memory(tiny_llama(), 1000 << 20)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    with pytest.raises(InputError, match="needs about 1024 MiB of memory besides the model"):
        check_memory(tiny_llama(), 0)


def test_an_export_that_quantises_asks_for_more(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = weight_bytes(tiny_llama(), torch.float32, None, as_stored=False).graph
    enough = int(preflight.SPACE_FACTOR * graph) + preflight.SPACE_CONSTANT
    out = tmp_path / "engine.onnx"
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=enough))
    check_space(WeightBytes(graph), out)
    with pytest.raises(InputError, match="and the export needs about"):
        export_tiny(tiny_checkpoint, tiny_transfer, out)
    monkeypatch.undo()
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    with pytest.raises(InputError, match="of memory besides the model"):
        export_tiny(tiny_checkpoint, tiny_transfer, out)
    assert not list(tmp_path.iterdir())


def export_tiny(checkpoint: Path, transfer: Path, out: Path) -> None:
    settings = ExportSettings(precision="int8")
    export(str(checkpoint), transfer, out, settings, lambda _: nullcontext(lambda _: None))


def test_a_draft_head_is_written_beside_the_whole_one() -> None:
    for dtype, storage in ((torch.float16, None), (torch.float32, STORED["int8"])):
        found, without = (
            weight_bytes(tiny_llama(), dtype, storage, as_stored=storage is not None, draft_size=size)
            for size in (100, 0)
        )
        values = 100 * 32
        assert found.graph - without.graph == values * dtype.itemsize
        bits = 0.0 if storage is None else storage.bits
        assert found.quantised - without.quantised == pytest.approx(values * bits / 8, abs=1)
