"""Files of an engine: damaged, exchanged, or written by somebody hostile with hashes that are right."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

import runtime.engines.tensorrt
import runtime.generator
from plugins.binaries import COMMIT, COMMIT_ENTRY, Kernel, KernelBinaries
from runtime import EngineError, Generator, InputError
from runtime.bundle.engine_file import EngineFile, read_engine_file
from runtime.bundle.placing import check_replaceable
from runtime.bundle.reading import EngineFiles
from runtime.bundle.tuning_file import read_tuning, tuning_path, write_tuning
from runtime.drafting.draft_tokens import write_draft_tokens
from runtime.engines.opening import open_engine
from runtime.engines.plans import RuntimeCache
from runtime.engines.protocol import Engine
from runtime.tuning import cpu_name
from tests.hostile.binaries import damaged_kernels, damaged_npy, damaged_protobuf
from tests.hostile.cases import Case, FaultError, Kind, Kinds, load_json
from tests.hostile.damage import damaged, damaged_json, drawn
from tests.hostile.tokenizer_parts import PARTS

KINDS = Kinds()
# An engine of an earlier release, that every later one reads.
ENGINE = Path(__file__).resolve().parents[1] / "fixtures" / "engine-0.1.0"
NAME, DESCRIPTION = "engine.onnx", "engine.json"
TOKENIZER, TEMPLATE, TABLES = "engine.tokenizer.json", "engine.chat_template.jinja", "engine.correction.npy"
DRAFTED = "engine.draft_tokens.npy"
GRAPH, LOWERED, WEIGHTS = "engine.onnx", "engine.cpu.onnx", "engine.onnx.data"
PLAN, KERNELS, TUNINGS = "engine.plan", "engine.kernels.bin", "engine.tuning.json"
RECORDS = {
    "graph": GRAPH,
    "cpu_graph": LOWERED,
    "weights": WEIGHTS,
    "tokenizer": TOKENIZER,
    "chat_template": TEMPLATE,
    "correction": TABLES,
    "draft_tokens": DRAFTED,
}
BINS = [{"predicted": 0.1, "observed": 0.05}, {"predicted": 0.5, "observed": 0.6}]
PROMPTS = ("Hello, tea.", "<|user|></s>  \x00 é\u0301 🫖 \u200d" + "a" * 40 + "1" * 20 + " \n" * 10)


def texts_of(generator: Generator, *prompts: Any, **options: Any) -> None:
    """Have each prompt answered speculatively and plainly. Raises `FaultError` where the texts differ, and `InputError`
    where there is none.
    """
    for prompt in prompts:
        both: list[Any] = []
        for speculate in (True, False):
            try:
                found = generator.generate(prompt, max_new_tokens=4, speculate=speculate, **options)
                # A list of texts is several prompts.
                both.append([(one.tokens, one.text) for one in (found if isinstance(found, list) else [found])])
            except InputError as error:
                both.append(error)
        if any(isinstance(one, InputError) for one in both):
            if not all(isinstance(one, InputError) for one in both):
                raise FaultError(f"speculation decides whether there is an error: {both!r}")
            raise both[0]
        if both[0] != both[1]:
            raise FaultError(f"speculative and plain decoding differ: {both!r}")


def _reusing(opened: Callable[..., Engine]) -> Callable[..., Engine]:
    """Return an `open_engine` that opens one of the same graph, weights and dimensions once: it takes long."""
    known: dict[Any, Engine] = {}

    def opening(files: EngineFiles, about: EngineFile, *how: Any) -> Engine:
        if about.plan is not None:
            return opened(files, about, *how)
        records = (about.graph, about.cpu_graph, about.weights)
        key = (*(record and (record.name, record.sha256) for record in records), about.dims, how)
        if key not in known:
            known.clear()
            known[key] = opened(files, about, *how)
        return known[key]

    return opening


def _files(folder: Path, *, template: bool = False) -> dict:
    """Put the engine into `folder`; return its description, without a chat template unless that is asked for: one costs
    a process.
    """
    runtime.generator.open_engine = _reusing(open_engine)  # type: ignore[attr-defined]
    shutil.copytree(ENGINE, folder)
    (folder / "expected.json").unlink()
    (folder / TUNINGS).unlink()
    about = load_json(folder / DESCRIPTION)
    about["transfer"]["acceptance"] = {"calibration": [{"bins": BINS}] * 3}
    # Its graph has logits of all tokens for drafts: a head over every one of them.
    vocab_size = about["dims"]["vocab_size"]
    write_draft_tokens(np.arange(vocab_size), folder / DRAFTED)
    about["dims"]["draft_size"] = vocab_size
    about["draft_tokens"] = _record(DRAFTED, (folder / DRAFTED).read_bytes())
    if not template:
        (folder / TEMPLATE).unlink()
        about["chat_template"] = None
    (folder / DESCRIPTION).write_text(json.dumps(about))
    return about


def _record(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _recorded(about: dict, files: Mapping[str, bytes]) -> Case:
    """Return the case of an engine with these files, whose description has their hashes."""
    about = copy.deepcopy(about)
    for field, name in RECORDS.items():
        if name in files:
            about[field] = _record(name, files[name])
    return Case({**files, DESCRIPTION: json.dumps(about).encode()})


@contextlib.contextmanager
def _failing_engines() -> Iterator[None]:
    """Take an engine that fails while it runs, as a damaged graph may make it, for one that is refused."""
    try:
        yield
    except EngineError as error:
        raise InputError(str(error)) from error


def _generator(folder: Path) -> Generator:
    return Generator(folder / NAME, threads=1, adapt=False)


@KINDS.add("descriptions of engines", "engine.json", "engine.json header", "engine.json of any release")
def _descriptions(folder: Path) -> Kind:
    about = _files(folder, template=True)
    records = [about[field] for field in RECORDS]

    def use(case: Case) -> None:
        engine = folder / NAME
        # Not taken for an engine of ours, perhaps; it may still be one.
        with contextlib.suppress(InputError):
            check_replaceable(engine)
        with _failing_engines():
            texts_of(_generator(folder), "Hello")

    cases = st.builds(lambda content: Case({DESCRIPTION: content}), damaged_json(about, records))
    return Kind(folder, cases, use)


@KINDS.add("tokenizers", "tokenizer.json")
def _tokenizers(folder: Path) -> Kind:
    about = _files(folder)
    sample = load_json(folder / TOKENIZER)

    def use(case: Case) -> None:
        generator = _generator(folder)
        refused: InputError | None = None
        for prompt in PROMPTS:
            try:
                texts_of(generator, prompt, stop=["zz"])
                texts_of(generator, prompt, escape_special_tokens=True)
            except InputError as error:
                # Others may have a text, and must not be worse.
                refused = error
        generator.decode(list(range(264)))
        if refused:
            raise refused

    content = st.one_of(damaged_json(sample, PARTS), damaged((folder / TOKENIZER).read_bytes()))
    cases = st.builds(lambda content: _recorded(about, {TOKENIZER: content}), content)
    return Kind(folder, cases, use)


@KINDS.add("tables of corrections", "correction.npy")
def _tables(folder: Path) -> Kind:
    about = _files(folder)
    content = damaged_npy((folder / TABLES).read_bytes())
    cases = st.builds(lambda content: _recorded(about, {TABLES: content}), content)
    return Kind(folder, cases, lambda case: texts_of(_generator(folder), "Hello"))


@KINDS.add("tokens of drafts", "draft_tokens.npy")
def _draft_tokens(folder: Path) -> Kind:
    about = _files(folder)
    content = damaged_npy((folder / DRAFTED).read_bytes())
    cases = st.builds(lambda content: _recorded(about, {DRAFTED: content}), content)
    return Kind(folder, cases, lambda case: texts_of(_generator(folder), "Hello"))


@KINDS.add("tunings", "tuning.json", "file in the place of tuning.json")
def _tunings(folder: Path) -> Kind:
    about = _files(folder)
    engine = folder / NAME
    described = read_engine_file(engine)
    sample = load_json(ENGINE / TUNINGS)
    entry = {**sample["tunings"][0], "device": cpu_name(1), "engine_sha256": described.identity}
    sample["tunings"] = [entry, {**entry, "device": "another"}]
    (folder / TUNINGS).write_text(json.dumps(sample))
    valid = read_tuning(engine, described.identity, cpu_name(1), described.dims)
    assert valid is not None

    def use(case: Case) -> None:
        found = read_tuning(engine, described.identity, cpu_name(1), described.dims)
        if found is not None:
            texts_of(Generator(engine, threads=1), "Hello")
        with contextlib.suppress(InputError):
            check_replaceable(engine)
        # Whatever is there now is kept, or replaced.
        write_tuning(engine, valid)
        again = read_tuning(engine, described.identity, cpu_name(1), described.dims)
        if again is None or again.menu.sizes != valid.menu.sizes:
            raise FaultError("a tuning that was written is not read")

    cases = st.builds(lambda content: Case({tuning_path(engine).name: content}), damaged_json(sample, [about]))
    return Kind(folder, cases, use)


@drawn
def _graph_cases(draw: st.DrawFn, about: dict, files: dict[str, bytes]) -> Case:
    what = draw(st.sampled_from((LOWERED, LOWERED, LOWERED, GRAPH, WEIGHTS)))
    changed = draw(damaged(files[what]) if what == WEIGHTS else damaged_protobuf(files[what]))
    if what == GRAPH:
        # The one that is run where there is no lowered one.
        about = {**about, "cpu_graph": None}
    return _recorded(about, {what: changed})


@KINDS.add("graphs and weights", "graph")
def _graphs(folder: Path) -> Kind:
    about = _files(folder)
    files = {name: (folder / name).read_bytes() for name in (GRAPH, LOWERED, WEIGHTS)}

    def use(case: Case) -> None:
        generator = _generator(folder)
        # Weights that are damaged may be so alike that rounding decides: the texts are not compared.
        with _failing_engines():
            for speculate in (True, False):
                generator.generate("Hello", max_new_tokens=4, speculate=speculate)

    return Kind(folder, _graph_cases(about, files), use)


@KINDS.add("plans and their kernels", "kernels.bin")
def _plans(folder: Path) -> Kind:
    about = _files(folder)
    engine = Generator(folder / NAME, threads=1, adapt=False).engine
    for file in (GRAPH, LOWERED, WEIGHTS):
        (folder / file).unlink()
    (folder / PLAN).write_bytes(b"a plan")
    commit = {COMMIT: Kernel(COMMIT_ENTRY, 32, 0, b"\x7fELF")}
    kernels = KernelBinaries("float32", about["dims"]["head_dim"], {80: commit, 90: commit}).to_bytes()
    (folder / KERNELS).write_bytes(kernels)
    about["plan"] = {
        "product": "tensorrt-rtx",
        "version": "1.7.1.116",
        "compute_capabilities": [[8, 0], [9, 0]],
        "attention": "native",
        "plugin_version": None,
        "limits": {"max_batch": 1, "max_context": 200, "max_rows": 12, "chunk": 16},
        "profiles": {"verification": {"input_ids": [[1, 1], [1, 6], [1, 12]]}},
        "kernels": _record(KERNELS, kernels),
        "build": {"seconds": 1.0, "engine_layers": {"Attention": 1}},
    }
    about |= {"graph": _record(PLAN, b"a plan"), "cpu_graph": None, "weights": None, "max_context": 200}
    (folder / DESCRIPTION).write_text(json.dumps(about))
    dims = read_engine_file(folder / PLAN).dims

    def open_plan(
        _path: Path, wanted: Any, _plan: Any, _hash: str, _usual: Any, binaries: KernelBinaries, **_: object
    ) -> Engine:
        # In the place of the class, which needs a GPU.
        if wanted != dims:
            raise InputError("no plan of these dimensions here")
        try:
            binaries.for_device(8, 0)
        except ValueError as error:
            raise InputError(str(error)) from error
        KernelBinaries.from_bytes(binaries.to_bytes())
        return engine

    runtime.engines.tensorrt.TensorRTEngine = open_plan  # type: ignore[assignment, misc]

    def with_kernels(content: bytes) -> Case:
        recorded = {**about, "plan": {**about["plan"], "kernels": _record(KERNELS, content)}}
        return Case({KERNELS: content, DESCRIPTION: json.dumps(recorded).encode()})

    of_kernels = st.builds(with_kernels, damaged_kernels(kernels))
    parts = [about["plan"]["kernels"], about["plan"]["limits"]]
    of_plans = st.builds(
        lambda plan: Case(
            {DESCRIPTION: json.dumps({**about, "plan": 0}).encode().replace(b'"plan": 0', b'"plan": ' + plan)}
        ),
        damaged_json(about["plan"], parts),
    )

    def use(case: Case) -> None:
        texts_of(Generator(folder / PLAN, adapt=False), "Hello")

    return Kind(folder, st.one_of(of_kernels, of_plans), use)


class _Cache:
    """A runtime cache as TensorRT for RTX has them: takes what it has written."""

    def deserialize(self, held: bytes) -> bool:
        return held == b"kernels"

    def serialize(self) -> bytes:
        return b"kernels and more"


class _Config:
    def create_runtime_cache(self) -> _Cache:
        return _Cache()

    def set_runtime_cache(self, cache: _Cache) -> None:
        pass


@KINDS.add("runtime caches", "runtime cache")
def _runtime_caches(folder: Path) -> Kind:
    plan_hash = "0" * 64
    place = folder / "hidden-transfer"
    place.mkdir(parents=True)
    file = place / f"{plan_hash[:32]}.runtime-cache"
    file.write_bytes(b"kernels")

    def use(case: Case) -> None:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = str(folder)
        try:
            cache = RuntimeCache(None, plan_hash)
            cache.configure(_Config())
            cache.save()
        finally:
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before
        if file.read_bytes() != b"kernels and more":
            raise FaultError("a damaged runtime cache is kept")

    content = st.one_of(damaged(b"kernels"), st.just(bytes(1 << 20)), st.none())
    cases = st.builds(lambda content: Case({str(file.relative_to(folder)): content}), content)
    return Kind(folder, cases, use)


@drawn
def _exchanged_cases(draw: st.DrawFn, files: dict[str, bytes]) -> Case:
    name = draw(st.sampled_from(sorted(files)))
    if draw(st.integers(0, 3)):
        content = draw(damaged(files[name]))
        # Of the right size, mostly: the wrong one is found at once.
        if draw(st.integers(0, 2)):
            content = (content + files[name])[: len(files[name])]
    else:
        content = files[draw(st.sampled_from(sorted(files)))]
    return Case({name: content}, exchanged=content != files[name])


@KINDS.add("exchanged files", "chat_template.jinja")
def _exchanged(folder: Path) -> Kind:
    _files(folder, template=True)
    files = {name: (folder / name).read_bytes() for name in RECORDS.values()}
    return Kind(
        folder,
        _exchanged_cases(files),
        lambda case: texts_of(_generator(folder), "Hello"),
    )
