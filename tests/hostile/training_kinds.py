"""The files of training, measuring and building: read at build time."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st
from rich.progress import Progress

import ht_export.training.sweep
from ht_export.bench.load.arrivals import trace
from ht_export.bench.measure import Row, Runs
from ht_export.bench.peers.models import DESCRIBED, Described
from ht_export.bench.peers.results import Answered, Entry, Measured, Tried
from ht_export.bench.peers.results import opened as opened_peers
from ht_export.bench.peers.table import to_markdown as peers_to_markdown
from ht_export.bench.results import Results
from ht_export.bench.settings import PLAIN, SPECULATIVE, Job
from ht_export.prompts import encode_chat, evenly, read_conversations, without_duplicates
from ht_export.tensorrt import build_process, worker
from ht_export.training.batches import make_batch
from ht_export.training.data import MANIFEST, MANIFEST_VERSION, AnsweredPrompt, read_data
from ht_export.training.features import FeatureCache
from ht_export.training.fit import fit
from ht_export.training.recipe import run as recipe
from ht_export.training.recipe.choices import Choices
from ht_export.training.recipe.record import RECORD, Pace, WorkFolder
from ht_export.training.settings import FitSettings
from ht_export.training.skip_record import SearchRecord
from ht_export.training.skip_search import SearchSettings, search
from ht_export.training.sweep import SweepSettings, recommendation, sweep, table
from runtime import InputError, Sampling
from runtime.files import write_json
from tests.hostile.binaries import damaged_safetensors
from tests.hostile.cases import Case, FaultError, Kind, Kinds, load_json
from tests.hostile.checkpoint_kinds import base_of, one_file
from tests.hostile.damage import damaged, damaged_json, damaged_lines

KINDS = Kinds()
QUIET = Progress(disable=True)
DATA = [AnsweredPrompt(str(i), "a", [5 + i, 6, 7], [8, 9, 10 + i, 11, 12]) for i in range(4)]


@KINDS.add("prompts", "prompt")
def _prompts(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "prompts.jsonl"
    values = [
        {"id": 1, "task": "a", "prompt": "Hello"},
        {"turns": ["Hello, tea.", "Again"]},
        {"prompt": "x", "turns": []},
    ]
    path.write_text("\n".join(map(json.dumps, values)))
    base = base_of(folder)

    def use(case: Case) -> None:
        found = evenly(without_duplicates(read_conversations(path), max_turns=2), 3)
        for conversation in found:
            if len("".join(conversation.turns)) < 10_000:
                encode_chat(base.tokenizer, conversation.turns, ["Yes"] * (len(conversation.turns) - 1))

    cases = st.builds(lambda content: Case({path.name: content}), damaged_lines(values))
    return Kind(folder, cases, use)


@KINDS.add("arrivals", "arrival")
def _arrivals(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "trace.jsonl"
    values = [{"time": 0.5}, {"time": 0}, {"time": 12.25, "other": 1}]
    path.write_text("\n".join(map(json.dumps, values)))

    def use(case: Case) -> None:
        times = trace(path, 5).times
        if not 0 < len(times) <= 5 or times[0] or list(times) != sorted(times):
            raise FaultError(f"no arrivals: {times!r}")

    cases = st.builds(lambda content: Case({path.name: content}), damaged_lines(values))
    return Kind(folder, cases, use)


@KINDS.add("data of training", "manifest of data", "answered prompt")
def _data(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    base = base_of(folder)
    shard = "shard-0-00000.jsonl"
    manifest = {
        "version": MANIFEST_VERSION,
        "base_model": base.identity(),
        "shards": [shard],
        "sequences": len(DATA),
        "dtype": "float32",
        "prompts_sha256": "0" * 64,
        "settings": {"max_new_tokens": 5},
    }
    values = [asdict(sequence) for sequence in DATA]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / shard).write_text("\n".join(map(json.dumps, values)))

    def use(case: Case) -> None:
        found = read_data(folder, base, 4)
        make_batch(found[:4], 1, None, None)

    cases = st.one_of(
        st.builds(lambda content: Case({MANIFEST: content}), damaged_json(manifest)),
        st.builds(lambda content: Case({shard: content}), st.one_of(damaged_lines(values), st.none())),
    )
    return Kind(folder, cases, use)


@KINDS.add("features", "description of features", "file of features")
def _features(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    base = base_of(folder)

    def use(case: Case) -> None:
        cache = FeatureCache(folder, base, (2, 3), DATA, QUIET, normalisers=True)
        cache.context(make_batch(DATA[:2], 2, None, None))

    use(Case())
    description = load_json(folder / "features.json")
    files = "features-00000.safetensors", "normalisers-00000.safetensors"
    cases = st.one_of(
        st.builds(lambda content: Case({"features.json": content}), damaged_json(description)),
        *(st.builds(partial(one_file, file), damaged_safetensors((folder / file).read_bytes())) for file in files),
    )
    return Kind(folder, cases, use)


FIT = FitSettings(
    layers=(2, 3), steps=2, sequences=2, anchors=4, init="identity", correction_rank=2, schedule="constant"
)


@KINDS.add("fits", "whole checkpoint of ht-train fit", "safetensors file of ht-train fit")
def _fits(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    base = base_of(folder)
    path = folder / "fit.safetensors"

    def use(case: Case, steps: int = 3) -> None:
        settings = FitSettings(**{**vars(FIT), "steps": steps})
        options: dict[str, Any] = {"held_out": DATA[:2], "evaluate_every": 1, "report": lambda _: None}
        fit(base, DATA, settings, path, QUIET, **options)

    use(Case(), steps=2)
    content = damaged_safetensors(path.read_bytes(), "fit")
    cases = st.builds(lambda content: Case({path.name: content}), content)
    return Kind(folder, cases, use)


@KINDS.add("records of whole runs", "record of ht-train all")
def _records(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    asked = {"model": "tiny", "--hours": 2.0, "--layers": [2, 3]}
    made = WorkFolder(folder, asked)
    made.choose(Choices((2, 3), 40, "fp32", "float32", 2, 8, 4))
    made.set_pace(Pace(20, 2, 5, 0.5))
    made.finish("data", "0" * 64)
    options = argparse.Namespace(
        model="tiny", adapters=[], prompts=Path("p"), out=Path("o"), device="cpu", threads=1, seed=0
    )

    def use(case: Case) -> None:
        record = WorkFolder(folder, asked).record
        if record.choices is not None and record.pace is not None:
            for stage in recipe._fit_stages(options, folder, record.choices, record.pace, ()):
                shlex.join(stage.words)
                record.done.get(stage.name)

    cases = st.builds(lambda content: Case({RECORD: content}), damaged_json(load_json(folder / RECORD)))
    return Kind(folder, cases, use)


@KINDS.add("sweeps", "file of sweep results")
def _sweeps(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    base = base_of(folder)
    settings = SweepSettings(((1, 1), (2, 3)), steps=2, rungs=2)

    def run() -> None:
        rows = sweep(base, DATA, DATA[:2], FIT, settings, folder, QUIET, report=lambda _: None)
        table(rows)
        recommendation(rows, settings.row_cost)

    def use(case: Case) -> None:
        def no_fit(*_: Any, **__: Any) -> None:
            raise InputError("nothing is trained here, and a result is missing")

        with patch.object(ht_export.training.sweep, "fit", no_fit):
            run()

    run()
    for path in folder.glob("*.checkpoint*"):
        path.unlink()
    sample = load_json(folder / "sweep.json")
    cases = st.builds(lambda content: Case({"sweep.json": content}), damaged_json(sample))
    return Kind(folder, cases, use)


@KINDS.add("searches of blocks", "record of ht-train skip-blocks")
def _searches(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "blocks.json.checkpoint"
    base = base_of(folder)
    settings = SearchSettings(budget=6)
    run = {"row_cost": settings.row_cost, "base_model": base.identity()}

    def use(case: Case) -> None:
        record = SearchRecord(path, run)
        found, _ = search(base, DATA[:2], settings, known=dict(record.evaluated), keep=record.add)
        found.blocks.check(base.model.config.num_hidden_layers)

    use(Case({}))
    cases = st.builds(lambda content: Case({path.name: content}), damaged_json(load_json(path)))
    return Kind(folder, cases, use)


@KINDS.add("results of measuring", "file of results of ht-bench run")
def _results(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "results.json"
    runs = Runs([5, 5], [3, 3], [10.0, 11.0], [20.0, 21.0], [0.1, 0.1], [1, 2], True, None)
    jobs = [Job(str(number), "a", "Hello", Sampling()) for number in range(3)]
    rows = [Row(job.id, job.task, None, 7, {PLAIN: runs, SPECULATIVE: runs}) for job in jobs]
    conditions = {"date": "2025-01-01", "commit": "0", "model": "tiny", "prompts": {"file": "x", "count": 3}}
    made = Results(path, conditions, jobs)
    for row in rows[:2]:
        made.add(row)

    def use(case: Case) -> None:
        found = Results(path, conditions, jobs)
        json.dumps(found.to_dict())
        for row in rows[len(found.rows) :]:
            found.add(row)

    cases = st.builds(lambda content: Case({path.name: content}), damaged_json(load_json(path)))
    return Kind(folder, cases, use)


@KINDS.add("results of peers", "file of results of ht-bench peers")
def _peer_results(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "results.json"
    conditions = {"date": "2026-01-01", "commit": "0", "model": "tiny", "device": "a CPU", "threads": 1, "rounds": 1}
    conditions |= {"prompts": {"file": "x", "count": 1}, "max_new_tokens": 2}
    made = opened_peers(path, conditions)
    made.reference = [[1, 2]]
    made.entries["one"] = Entry("one", "One", "float32", "1", "a file", 7)
    made.tried.append(Tried("one", 1, {"lookup": 3}, 2.0))
    answers = [Answered(2, 1, 0.1, 0.2, None)]
    made.rows.append(Measured("one", 1, 0, {"lookup": 3}, {}, 0.5, 9, 0.2, answers))
    made.write()

    def use(case: Case) -> None:
        found = opened_peers(path, conditions)
        json.dumps(found.to_dict())
        peers_to_markdown(found)

    return Kind(folder, st.builds(lambda content: Case({path.name: content}), damaged_json(load_json(path))), use)


@KINDS.add("models for peers", "description of a model made ready for peers")
def _peer_models(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    path = folder / "model.json"
    write_json(path, asdict(Described("tiny", "0" * 64, [2], 100, 264)))
    cases = st.builds(lambda content: Case({path.name: content}), damaged_json(load_json(path)))
    return Kind(folder, cases, lambda case: DESCRIBED.read(path))


class _Config:
    """A builder's configuration whose library takes the timing caches that it wrote."""

    def create_timing_cache(self, held: bytes) -> bytes | None:
        return held if held in (b"", b"timings") else None

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        return True


@KINDS.add("builds of plans", "request for a build", "result of a build", "event of a build", "timing cache")
def _builds(folder: Path) -> Kind:
    folder.mkdir(parents=True)
    request = worker.BuildRequest(
        "tensorrt-rtx", "a.onnx", "a.plan", "result.json", [(8, 0)], [{"x": [[1], [2], [3]]}], None, 3, "timing"
    )
    result = worker.BuildResult(None, 1.5, 10, 9, {"PLUGIN_V3": 3}, ["layer"], ["warning"])
    event = worker.BuildEvent("a", 1, 2)
    values: Mapping[str, Any] = {"request.json": request, "result.json": result, "event.json": event}
    for file, value in values.items():
        (folder / file).write_text(json.dumps(asdict(value)))
    (folder / "timing").write_bytes(b"timings")

    def use(case: Case) -> None:
        worker._timing_cache(_Config(), str(folder / "timing"))
        found = build_process._read(folder / "result.json")
        if found is not None:
            asdict(found)
        event = worker.EVENTS.decode((folder / "event.json").read_bytes(), "an event")
        "".join([event.phase, "." * min(event.step, 9), "." * min(event.steps, 9)])
        asdict(worker.REQUESTS.read(folder / "request.json"))

    def with_file(file: str) -> Callable[[bytes], Case]:
        return lambda content: Case({file: content})

    cases = st.one_of(
        st.builds(with_file("timing"), damaged(b"timings")),
        *(st.builds(with_file(file), damaged_json(load_json(folder / file))) for file in values),
    )
    return Kind(folder, cases, use)
