"""`ht-export inspect` tells what an engine is, from its files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ht_export.cli import main
from ht_export.inspection.describe import inspect
from ht_export.inspection.parts import part_of
from ht_export.inspection.timing import _Event, _nodes, time_passes


def told(engine: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["inspect", str(engine), *options]) == 0
    return capsys.readouterr().out


def in_json(engine: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    return json.loads(told(engine, capsys, "--json", *options))


def test_weights_are_told_by_part_and_are_all_of_the_file(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = in_json(tiny_engine, capsys)
    sizes = found["weight_bytes"]
    # Four layers: queries and output 32 x 32, keys and values 16 x 32, an MLP of three times 64 x 32. All norms of this
    # model are ones, and stored once.
    assert sizes["layers"] == 4 * 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert sizes["transfer layers"] == 3 * 4 * (32 * 32 + 32)
    assert (sizes["head"], found["tied_head"]) == (4 * (264 * 32 + 32), True)
    # Norms and biases of so small a model are in the graph itself.
    assert sum(sizes.values()) - sizes["other"] == found["files"]["weights"]["bytes"] + 4 * (32 + 3 * 32)


def test_a_pass_costs_each_part_what_its_rows_do(tiny_engine: Path) -> None:
    costs = {cost.part: cost.products for cost in inspect(tiny_engine).costs}
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32
    # Six candidates; pseudo rows 6, 4 and 2 join at layers 3, 1 and 3.
    assert costs["layers"] == pytest.approx(layer * (6 + 10 + 10 + 18) / 1e6)
    assert costs["head"] == pytest.approx(264 * 32 * 18 / 1e6)
    assert costs["transfer layers"] == pytest.approx(32 * 32 * 12 / 1e6)


def test_a_draft_head_has_its_own_weights_and_rows(draft_head_engine: Path) -> None:
    costs = {cost.part: cost.products for cost in inspect(draft_head_engine).costs}
    assert costs["head"] == pytest.approx(264 * 32 * 6 / 1e6)
    assert costs["draft head"] == pytest.approx(inspect(draft_head_engine).about.dims.draft_width * 32 * 12 / 1e6)


def test_what_it_is_and_was_compared_with_is_told(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(tiny_engine, capsys)
    for part in (
        "ONNX graph, float32",
        "6 candidates, pseudo rows 6, 4, 2",
        "largest_relative_difference",
        "engine.onnx.data",
        "graph for the CPU: ",
        "head (also the embeddings)",
    ):
        assert part in text, part
    found = in_json(tiny_engine, capsys)
    assert found["base_model"]["architecture"] == "llama"
    assert found["operators"]["engine"]["ht.llm::TreeAttention"] == 4


def test_the_time_of_a_pass_is_that_of_its_nodes_each_counted_once(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(tiny_engine, capsys, "--time", "--threads", "1")
    assert "time of a pass by part (engine.cpu.onnx, 18 rows behind 128 tokens" in text
    timing = time_passes(tiny_engine, inspect(tiny_engine).about, 1)
    assert {"layers", "attention", "head", "transfer layers"} <= timing.parts.keys()
    assert sum(timing.operators.values()) == pytest.approx(timing.milliseconds) == sum(timing.parts.values())


def test_nodes_within_others_are_not_counted_again() -> None:
    def node(name: str, start: int, duration: int) -> _Event:
        return _Event(f"{name}_kernel_time", "Node", start, duration, name)

    events = [node("a", 0, 5), node("inside", 7, 2), node("If", 6, 10), node("too", 10, 6), node("b", 16, 1)]
    assert [event.operator for event in _nodes(events)] == ["a", "If", "b"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.base.model.layers.12.self_attn.q_proj.weight+model.base.model.layers.12.x.weight", ("layers", 12)),
        ("model.base.model.embed_tokens.weight", ("embeddings", None)),
        ("model.base.lm_head.weight.changed.quantised", ("head", None)),
        ("model.base.model.norm.weight", ("head", None)),
        ("model.draft_head.weight", ("draft head", None)),
        ("model.transfer.maps.2.bias", ("transfer layers", 2)),
        ("val_25", ("other", None)),
    ],
)
def test_names_of_weights_tell_their_part(name: str, part: tuple[str, int | None]) -> None:
    assert part_of(name) == part


def test_what_is_no_engine_is_one_error(tmp_path: Path, engine_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none.onnx")]) == 1
    assert "ht-export inspect: error: no engine at" in capsys.readouterr().err
    engine_copy.with_name("engine.onnx.data").write_bytes(b"x")
    assert main(["inspect", str(engine_copy)]) == 1
    assert "is not the file that engine.json describes" in capsys.readouterr().err


def test_a_model_may_still_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "inspect"), "--out", str(tmp_path / "e.onnx"), "--random-transfer"]) == 1
    assert "no checkpoint at" in capsys.readouterr().err
