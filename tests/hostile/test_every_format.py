"""Whatever is read from files is described as a format, and has a generator of hostile files."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from runtime.formats import Format
from tests.hostile.generators import GROUPS, makers
from tests.hostile.reading import Reading, formats_made_in, readings_in, readings_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("runtime", "ht_export", "plugins")

OWN = "what this program has written itself, a moment before"
SYSTEM = "a file of the system's"
READER = "what reads all formats"
PART = "a part of a format that is read and bounded before"
MEMORY = "bytes in memory, no file"
WRITTEN_TO = "no content is read"
ALLOWED = {
    Reading("runtime/formats.py", "Format.opened", "open"): READER,
    Reading("runtime/formats.py", "Format.fit", "msgspec.convert"): READER,
    Reading("runtime/formats.py", "JsonFormat.decode", "msgspec.json.decode"): READER,
    Reading("ht_export/formats.py", "PythonJsonFormat.parse", "json.loads"): READER,
    Reading("ht_export/model/tensors.py", "opened_tensors", "safe_open"): f"{READER} of safetensors",
    Reading("runtime/bundle/engine_file.py", "FileRecord._opened", "open"): f"{READER} of an engine's files",
    Reading("runtime/bundle/engine_file.py", "FileRecord.read", "open"): f"{READER} of an engine's files",
    Reading("runtime/bundle/reading.py", "_open", "open"): "weights and plans, by `FileRecord.open`",
    Reading("runtime/files.py", "sha256_file", "open"): "hashed alone",
    Reading("runtime/bundle/placing.py", "_write_through", "os.open"): WRITTEN_TO,
    Reading("runtime/program.py", "_discard_stdout", "os.open"): WRITTEN_TO,
    Reading("runtime/program.py", "_usable_streams", "os.open"): WRITTEN_TO,
    Reading("ht_export/tensorrt/worker.py", "main", "os.fdopen"): WRITTEN_TO,
    Reading("runtime/serving/playground.py", "routes", "read_bytes"): "files of the package itself, sent as they are",
    Reading("ht_export/model/locate.py", "locate", "open"): "the four bytes that tell a GGUF file",
    Reading("ht_export/model/locate.py", "Location.find", "cached_file"): "finds a file, and reads none",
    Reading("ht_export/model/checkpoint.py", "_load", "from_pretrained"): "files that `check_files` has looked at",
    Reading(
        "ht_export/model/checkpoint.py", "_load_quantised", "from_pretrained"
    ): "the same files, weights as tensors",
    Reading("runtime/tokenizer.py", "parse_tokenizer", "from_buffer"): "the content of its format",
    Reading("runtime/drafting/correction.py", "TokenCorrection.of", "frombuffer"): "the content of its format",
    Reading("runtime/drafting/draft_tokens.py", "read_draft_tokens", "frombuffer"): "the content of its format",
    Reading("runtime/drafting/foresight.py", "Foresight.of", "msgspec.convert"): PART,
    Reading("runtime/drafting/reliability.py", "Reliability.of", "msgspec.convert"): PART,
    Reading("plugins/compile.py", "_assembled", "read_bytes"): "a cubin in Triton's cache, as Triton reads its own",
    Reading("plugins/compile_pool.py", "_Worker.answer", "msgspec.json.decode"): OWN,
    Reading("plugins/compile_pool.py", "_Worker._said", "read_text"): OWN,
    Reading("plugins/compile_worker.py", "main", "os.fdopen"): WRITTEN_TO,
    Reading("plugins/compile_worker.py", "main", "msgspec.json.decode"): OWN,
    Reading("plugins/kernel_index.py", "parse_index", "msgspec.json.decode"): PART,
    Reading("runtime/engines/external_weights.py", "external_weights", "FromString"): "the content of a graph",
    Reading("runtime/engines/onnxruntime.py", "_has_products_of_bytes", "read_bytes"): "one name is looked for in it",
    Reading("runtime/serving/ray.py", "key_of", "msgspec.json.decode"): "the beginning of a prompt, bounded",
    Reading("runtime/serving/ray.py", "options_of", "msgspec.convert"): "settings that whoever deploys it gives",
    Reading("runtime/engines/external_weights.py", "ExternalWeight.of", "frombuffer"): PART,
    Reading("runtime/engines/external_weights.py", "hand_over", "mmap.mmap"): "weights: numbers, whatever they are",
    Reading("runtime/engines/plans.py", "deserialise", "memmap"): "a plan, which the library checks",
    Reading("runtime/engines/plans.py", "deserialise", "deserialize_cuda_engine"): "a plan, which the library checks",
    Reading("runtime/chat/worker.py", "_receive", "json.loads"): OWN,
    Reading("runtime/chat/template.py", "ChatTemplate._ask", "json.loads"): "the answer of our process, bounded there",
    Reading("runtime/chat/worker.py", "_memory", "open"): SYSTEM,
    Reading("runtime/checks.py", "cores", "read_text"): SYSTEM,
    Reading("runtime/memory.py", "_of_machine", "read_text"): SYSTEM,
    Reading("runtime/memory.py", "container_bytes", "read_text"): SYSTEM,
    Reading("runtime/engines/dense_cache.py", "DenseCache._allocate", "mmap.mmap"): "memory of its own, and no file",
    Reading("runtime/engines/dense_cache.py", "DenseCache._allocate", "frombuffer"): "memory of its own",
    Reading("runtime/engines/dense_cache.py", "DenseCache._forget", "frombuffer"): "memory of its own",
    Reading("runtime/tuning.py", "cpu_name", "read_text"): SYSTEM,
    Reading("runtime/serving/admission.py", "decode", "msgspec.json.decode"): "the body of a request, bounded before",
    Reading("runtime/chat/conversation.py", "_with_object", "json.loads"): "arguments of a call in a message, bounded",
    Reading("runtime/grammar/given.py", "Grammar.json_schema", "json.loads"): "a schema that is given, bounded",
    Reading("runtime/grammar/schema.py", "prepared", "json.loads"): "the same, as it was written from it",
    Reading("runtime/grammar/calls.py", "_schema", "json.loads"): OWN,
    Reading("runtime/grammar/matcher.py", "Matcher.allowed", "frombuffer"): MEMORY,
    Reading("runtime/cuts.py", "cuts_of", "json.loads"): MEMORY,
    Reading("runtime/escaping.py", "ControlTokens.tokenizer", "from_str"): MEMORY,
    Reading("runtime/escaping.py", "ControlTokens.tokenizer", "json.loads"): MEMORY,
    Reading(
        "ht_export/bench/load/calling.py", "Caller._listen", "json.loads"
    ): "answers of the server that is measured",
    Reading("ht_export/bench/load/url.py", "_extra", "json.loads"): "an option",
    Reading("ht_export/bundle.py", "_described", "from_str"): MEMORY,
    Reading("ht_export/bundle.py", "_described", "json.loads"): MEMORY,
    Reading("ht_export/training/identity.py", "first_difference", "json.loads"): MEMORY,
    Reading("plugins/tensorrt_plugin.py", "_classes.TreeAttentionPlugin.get_fields_to_serialize", "frombuffer"): MEMORY,
    Reading("ht_export/gpu_day/own_files.py", "read_json", "json.loads"): "what it has written in an earlier run",
    Reading("ht_export/gpu_day/own_files.py", "read_json", "read_text"): "what it has written in an earlier run",
    Reading(
        "ht_export/gpu_day/kernels.py", "_read", "read_bytes"
    ): "kernels that it has compiled, with hashes in a kit",
    Reading("ht_export/gpu_day/pieces.py", "join", "open"): "pieces, by size and hash",
    Reading("ht_export/gpu_day/pieces.py", "split", "open"): "what is packed, whatever it is",
    Reading("ht_export/gpu_day/wheels.py", "_is_for", "read_text"): "of a package that is installed here",
    Reading("ht_export/export.py", "_write_lowered", "ir.load"): OWN,
    Reading("ht_export/graph/widen.py", "write_widened", "ir.load"): OWN,
    Reading("ht_export/quantize/gptq.py", "second_moments", "onnx.load"): OWN,
    Reading("ht_export/quantize/prepare.py", "prepare", "ir.load"): OWN,
    Reading("ht_export/quantize/weights.py", "quantise", "ir.load"): OWN,
    Reading("ht_export/quantize/weights.py", "_write_in_parts", "ir.load"): OWN,
    Reading("ht_export/tensorrt/graph.py", "attention_forms", "onnx.load"): OWN,
    Reading("ht_export/tensorrt/graph.py", "write_for_tensorrt", "onnx.load"): OWN,
    Reading("ht_export/tensorrt/worker.py", "build", "parse_from_file"): OWN,
    Reading("ht_export/tensorrt/worker.py", "build", "read_bytes"): OWN,
    Reading("ht_export/tensorrt/build_process.py", "_run", "open"): OWN,
    Reading(
        "ht_export/bench/self_speculative/draft_model.py", "DraftModel.__init__", "FromString"
    ): "the graph of an engine that runs; whatever it raises is one error",
    Reading("ht_export/inspection/describe.py", "inspect", "open"): "looked for alone",
    Reading("ht_export/inspection/timing.py", "time_passes", "open"): "looked for alone",
    Reading("ht_export/inspection/timing.py", "_events", "json.loads"): OWN,
    Reading("ht_export/inspection/timing.py", "_events", "read_text"): OWN,
    Reading("ht_export/bench/plan_weights.py", "write", "ir.load"): OWN,
    Reading("ht_export/bench/plan_weights.py", "write", "open"): OWN,
    Reading("ht_export/bench/plan_weights.py", "fold_weights", "ir.load"): OWN,
    Reading("ht_export/bench/peers/cli.py", "_work", "from_pretrained"): OWN,
    Reading("ht_export/bench/peers/gguf_files.py", "has_precision", "GGUFReader"): "its header is looked at before",
    Reading("ht_export/bench/peers/gguf_files.py", "convert", "GGUFReader"): "its header is looked at before",
    Reading(
        "ht_export/bench/peers/process.py", "Worker._read", "json.loads"
    ): "a line of a worker, bounded and checked",
    Reading("ht_export/bench/peers/workers/loop.py", "serve", "os.fdopen"): WRITTEN_TO,
    Reading("ht_export/bench/peers/workers/loop.py", "serve", "json.loads"): "a line of the process that started it",
    Reading("ht_export/bench/peers/workers/loop.py", "peak_bytes", "read_text"): SYSTEM,
    Reading("ht_export/bench/peers/workers/openvino_genai.py", "convert", "from_pretrained"): OWN,
    Reading("ht_export/bench/peers/workers/openvino_genai.py", "_tokenizer", "from_pretrained"): OWN,
    Reading(
        "ht_export/bench/peers/workers/transformers_generate.py", "Transformers.__init__", "from_pretrained"
    ): "what our benchmark has written",
    Reading("ht_export/bench/tune.py", "tune", "read_text"): OWN,
    Reading("ht_export/cli.py", "_export", "read_text"): OWN,
    Reading("ht_export/doctor/machine.py", "_lines", "read_text"): SYSTEM,
    Reading("ht_export/doctor/software.py", "_asked", "json.loads"): "what a process of its own prints",
    Reading("ht_export/verify/traces.py", "GraphTracer.__init__", "onnx.load"): "whatever it raises is one error",
    Reading("ht_export/verify/traces.py", "tapped_session", "onnx.load"): "whatever it raises is one error",
    Reading("ht_export/verify/traces.py", "_evaluator", "onnx.load_external_data_for_model"): "likewise",
}

SAMPLE = """
import json
from pathlib import Path

BEFORE = open("a").read()

class Reader:
    def read(self, path: Path) -> object:
        with path.open("w") as out, path.open() as file, open(path, mode="ab"), path.open("r+b"):
            return json.loads(file.read()), json.dumps({}), AutoConfig.from_pretrained(path)

def load(path):
    return lambda: np.load(path)
"""


def modules() -> Iterator[tuple[str, str]]:
    """Yield the name and the source of each module."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text(encoding="utf-8")


def test_every_format_has_a_name_in_its_module() -> None:
    assert [module for module, source in modules() if None in formats_made_in(source)] == []


def test_every_format_has_a_generator_of_hostile_files() -> None:
    formats = [
        getattr(importlib.import_module(module), name)
        for module, source in modules()
        for name in formats_made_in(source)
        if name is not None
    ]
    assert formats
    assert all(Format.known[format.name] is format for format in formats)
    generated = {name for group in GROUPS for maker in makers(group).values() for name in maker.formats}
    assert sorted({format.name for format in formats} ^ generated) == []


def test_formats_are_found_wherever_they_are_made() -> None:
    source = """
A = Format("a", 1, "b")
B = JsonFormat[Any]("b", 1, "c", kind=Any)
C = [Format("c", 1, "d")]

def d() -> object:
    E = formats.LinesFormat("e", 1, "f", kind=int)
    return CaseFormat
"""
    assert sorted(map(str, formats_made_in(source))) == ["A", "B", "None", "None"]


def test_what_is_read_without_a_format_is_named_here_with_its_reason() -> None:
    found = set(readings_of(ROOT, PACKAGES))
    assert sorted(found - ALLOWED.keys()) == []
    assert sorted(ALLOWED.keys() - found) == []


def test_the_search_for_what_is_read_finds_it() -> None:
    assert list(readings_in(SAMPLE)) == [
        ("", "open"),
        ("Reader.read", "open"),
        ("Reader.read", "open"),
        ("Reader.read", "json.loads"),
        ("Reader.read", "from_pretrained"),
        ("load", "np.load"),
    ]
