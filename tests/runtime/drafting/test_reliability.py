import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bindings import GraphDims
from runtime.bundle.engine_file import EngineFile, FileRecord, read_engine_file
from runtime.drafting.reliability import Reliability
from runtime.errors import EngineFileError
from runtime.tree import TreeSizes

shares = st.floats(0.0, 1.0)


@st.composite
def bins(draw: st.DrawFn) -> list[dict[str, float]]:
    predicted = sorted(draw(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=12, unique=True)))
    return [{"predicted": one, "observed": draw(shares), "count": 9} for one in predicted]


def statistics(*steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"calibration": [{"error": 0.01, "bins": step} for step in steps]}


def calibration(*steps: list[dict[str, float]]) -> Reliability:
    found = Reliability.of(statistics(*steps))
    assert found is not None
    return found


@given(bins(), st.lists(shares, min_size=2, max_size=20))
def test_a_more_probable_draft_is_never_worth_less(step: list[dict[str, float]], probabilities: list[float]) -> None:
    found = calibration(step)(0, np.sort(probabilities))
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert (np.diff(found) >= -1e-12).all()


@given(bins())
def test_a_bin_is_worth_what_was_observed_unless_a_less_probable_one_was_worth_more(
    step: list[dict[str, float]],
) -> None:
    predicted = np.array([one["predicted"] for one in step])
    observed = np.maximum.accumulate([one["observed"] for one in step])
    np.testing.assert_allclose(calibration(step)(0, predicted), observed)


def test_steps_have_their_own_observations() -> None:
    found = calibration(
        [{"predicted": 0.5, "observed": 0.6, "count": 1}], [{"predicted": 0.5, "observed": 0.3, "count": 1}]
    )
    assert found(0, np.array([0.5, 0.25])).tolist() == [0.6, 0.3]
    assert found(1, np.array([0.5, 0.25])).tolist() == [0.3, 0.15]


def test_steps_without_observations_are_taken_at_their_word() -> None:
    found = calibration([{"predicted": 0.5, "observed": 0.6, "count": 1}], [])
    for step in (1, 2):
        assert found(step, np.array([0.7, 0.2])).tolist() == [0.7, 0.2]


@pytest.mark.parametrize("acceptance", [{}, {"top": {"1": [0.5]}}, {"calibration": None}])
def test_without_statistics_there_is_no_calibration(acceptance: dict[str, Any]) -> None:
    assert Reliability.of(acceptance) is None


def engine_json(folder: Path, transfer: object) -> Path:
    """Write the description of an engine, and a file in the engine's place; return the latter."""
    engine = folder / "engine.onnx"
    engine.write_bytes(b"graph")
    record = FileRecord.of(engine)
    path = engine.with_suffix(".json")
    EngineFile(
        dims=GraphDims(2, 4, 2, 8, 32, 264, (1, 1)),
        precision="float32",
        tree=TreeSizes(4, (4, 2)),
        prompt_chunk=64,
        max_context=256,
        stop_tokens=(2,),
        special_tokens={},
        graph=record,
        cpu_graph=None,
        weights=None,
        tokenizer=record,
        chat_template=None,
        correction=None,
        base_model={},
        transfer={},
        versions={},
        parity={},
    ).write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "transfer": transfer}))
    return engine


GOOD = {"predicted": 0.5, "observed": 0.6, "count": 1}


@pytest.mark.parametrize("acceptance", [{}, {"calibration": None}, statistics([GOOD], [])])
def test_an_engine_with_sound_statistics_or_none_can_be_read(tmp_path: Path, acceptance: dict[str, Any]) -> None:
    assert read_engine_file(engine_json(tmp_path, {"acceptance": acceptance})).transfer["acceptance"] == acceptance


@pytest.mark.parametrize(
    "acceptance",
    [
        [1, 2],
        "text",
        {"calibration": 3},
        {"calibration": "text"},
        {"calibration": [3]},
        {"calibration": {"bins": []}},
        {"calibration": [{"error": 0.1}]},
        {"calibration": [{"bins": None}]},
        {"calibration": [{"bins": "text"}]},
        {"calibration": [{"bins": [[0.1, 0.2]]}]},
        statistics([{"predicted": 0.5}]),
        statistics([{**GOOD, "observed": "0.6"}]),
        statistics([{**GOOD, "observed": None}]),
        statistics([{**GOOD, "predicted": [0.5]}]),
        statistics([{**GOOD, "observed": float("nan")}]),
        statistics([{**GOOD, "predicted": float("inf")}]),
        statistics([{**GOOD, "predicted": -0.1}]),
        statistics([{**GOOD, "observed": 1.01}]),
        statistics([{**GOOD, "observed": 10**400}]),
        statistics([GOOD], [GOOD, {**GOOD, "predicted": 0.4}]),
    ],
    ids=lambda acceptance: json.dumps(acceptance)[:60],
)
def test_damaged_statistics_are_one_clear_error(tmp_path: Path, acceptance: object) -> None:
    engine = engine_json(tmp_path, {"acceptance": acceptance})
    # Numbers that JSON does not have are found before the statistics are looked at.
    with pytest.raises(EngineFileError, match=r"\((the statistics of drafts cannot be|JSON is malformed): .*; export"):
        read_engine_file(engine)


def test_transfer_layers_described_as_something_else_are_an_error(tmp_path: Path) -> None:
    engine = engine_json(tmp_path, [3])
    with pytest.raises(EngineFileError, match=r"\(Expected `object`, got `array` - at `\$\.transfer`\); export the"):
        read_engine_file(engine)
