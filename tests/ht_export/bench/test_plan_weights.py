"""An engine for the CPU that has a plan's weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ht_export.bench import cli
from ht_export.graph.widen import in_float32
from ht_export.quantize.precision import STORED_IN_PLANS
from ht_export.quantize.weights import quantise
from ht_export.verify.passes import LoweredEngine, compare, record
from runtime import Generator
from runtime.bundle.engine_file import read_engine_file
from runtime.engines.onnxruntime import OnnxRuntimeEngine


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_it_computes_what_the_plans_graph_does(half_engine: Path, tmp_path: Path, precision: str) -> None:
    out = tmp_path / "out" / "weights.onnx"
    out.parent.mkdir()
    assert cli.main(["plan-weights", str(half_engine), "--precision", precision, "--out", str(out)]) == 0
    dims = read_engine_file(half_engine).dims
    quantise(half_engine, tmp_path / "plan.onnx", STORED_IN_PLANS[precision])
    engine = LoweredEngine(out.with_suffix(".cpu.onnx"), replace(dims, dtype="float32"))
    differences = []
    for graph in (tmp_path / "plan.onnx", half_engine):
        with in_float32(graph, dims) as (widened, computed):
            # Small, it multiplies weights by their scales; else it would round rows too, as no plan does.
            expected = record(OnnxRuntimeEngine(widened, computed, small=True))
        differences.append(max(one.of_norm for one in compare(engine, expected)))
    assert differences[0] < 1e-4 < 5e-3 < differences[1]


def test_it_answers_and_says_what_it_is(half_engine: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "calibrated" / "weights.onnx"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about {n}."}) + "\n" for n in range(3)))
    out.parent.mkdir()
    given = [str(half_engine), "--precision", "int4", "--calibrate", str(prompts), "--out", str(out)]
    assert cli.main(["plan-weights", *given]) == 0
    generator = Generator(out)
    assert (generator.about.precision, generator.about.dims.dtype) == ("int4 of plans", "float32")
    assert generator.about.parity["quantisation"] == {"method": "GPTQ", "texts": 3}
    assert generator.generate("Hello", max_new_tokens=5).tokens
    placed = {path.name for path in out.parent.iterdir()}
    endings = ["json", "onnx", "onnx.data", "cpu.onnx", "tokenizer.json", "chat_template.jinja", "correction.npy"]
    # Which it has tuned itself with.
    assert placed == {f"weights.{ending}" for ending in [*endings, "tuning.json"]}


def test_engines_that_plans_are_not_built_from_are_refused(
    tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan-weights", str(tiny_engine), "--precision", "int8", "--out", str(tmp_path / "e.onnx")]) == 1
    assert "is not an .onnx engine in float16; export one with --precision fp16" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
