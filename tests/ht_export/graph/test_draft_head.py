"""The draft head in graphs: one matrix of weights, product and output of its own, in every precision."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from ht_export.export import ExportSettings, export
from ht_export.graph.lower_cpu import lower_for_cpu
from ht_export.graph.trace import build_graph
from ht_export.graph.widen import in_float32
from ht_export.model.dims import graph_dims
from ht_export.model.reference import HiddenTransferModel
from ht_export.quantize.precision import STORED_IN_PLANS
from ht_export.quantize.weights import quantise
from ht_export.tensorrt.graph import write_for_tensorrt
from ht_export.verify.passes import LoweredEngine, check, difference, record
from ht_export.verify.passes import ReferenceEngine as Reference
from runtime import Generator, Sampling
from runtime.bundle.engine_file import read_engine_file
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.conftest import DRAFT_TOKENS, random_transfer
from tests.ht_export.model.test_draft_head import FAMILIES, model_of

SIZE = len(DRAFT_TOKENS)


def model_with_head(name: str) -> HiddenTransferModel:
    base = model_of(name)
    return HiddenTransferModel(base, random_transfer((1, 0, 1), base.config.hidden_size, draft_tokens=DRAFT_TOKENS))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_graphs_compute_what_the_reference_does(name: str, tmp_path: Path) -> None:
    model = model_with_head(name).eval()
    dims = graph_dims(model.base.config, model.transfer)
    assert (dims.draft_size, dims.draft_width) == (SIZE, SIZE)
    path, lowered = tmp_path / "graph.onnx", tmp_path / "lowered.onnx"
    ir.save(build_graph(model), path, external_data="graph.onnx.data")
    onnx.checker.check_model(str(path), full_check=True)
    expected = record(Reference(model))
    assert check(OnnxRuntimeEngine(path, dims), expected) < 1e-4
    graph = ir.load(path)
    lower_for_cpu(graph, dims)
    ir.save(graph, lowered)
    assert check(LoweredEngine(lowered, dims), expected) < 1e-4


def head_of(path: Path) -> tuple[onnx.NodeProto, dict[str, onnx.TensorProto]]:
    """Return the product whose result is the draft logits, and the initializers."""
    graph = onnx.load(path, load_external_data=False).graph
    made = {output: node for node in graph.node for output in node.output}
    node = made["draft_logits"]
    while node.op_type not in ("MatMul", "MatMulNBits", "MatMulIntegerToFloat"):
        node = made[node.input[0]]
    return node, {one.name: one for one in graph.initializer}


@pytest.mark.parametrize("name", ["llama", "llama, tied head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_its_weights_are_written_once_and_gathered_at_no_run(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_with_head(name).eval()
    sizes = []
    for head, without in (("with", False), ("without", True)):
        if without:
            model = HiddenTransferModel(model.base, random_transfer((1, 0, 1), model.base.config.hidden_size)).eval()
        path = tmp_path / f"{head}.onnx"
        ir.save(build_graph(model, dtype), path, external_data=f"{head}.data")
        sizes.append(path.with_suffix(".data").stat().st_size)
    product, weights = head_of(tmp_path / "with.onnx")
    assert list(weights[product.input[1]].dims) == [32, SIZE]
    assert sum(SIZE in one.dims for one in weights.values()) == 1
    assert sizes[0] - sizes[1] == pytest.approx(32 * SIZE * dtype.itemsize, abs=1 << 12)


def test_a_graph_in_half_precision_and_its_weights_as_stored(tmp_path: Path) -> None:
    model = model_with_head("llama, tied head").eval()
    model.base.to(torch.float16)
    assert model.draft_head is not None
    model.draft_head.to(torch.float16)
    for name, dtype, as_stored in (("half", torch.float16, False), ("stored", torch.float32, True)):
        path = tmp_path / f"{name}.onnx"
        dims = graph_dims(model.base.config, model.transfer, str(dtype).removeprefix("torch."))
        ir.save(build_graph(model, dtype, as_stored=as_stored), path, external_data=f"{name}.data")
        graph = onnx.load(path, load_external_data=False).graph
        kept = {one.data_type for one in graph.initializer if SIZE in one.dims}
        assert kept == {onnx.TensorProto.FLOAT16}
        model.base.to(torch.float32)
        model.draft_head.to(torch.float32)
        expected = record(Reference(model))
        with in_float32(path, dims) as (widened, computed):
            # The maps are rounded too in half precision.
            assert difference(OnnxRuntimeEngine(widened, computed), expected) < (1e-2 if name == "half" else 1e-4)
        model.base.to(torch.float16)
        model.draft_head.to(torch.float16)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_its_weights_are_quantised_by_themselves(
    tiny_checkpoint: Path, draft_head_transfer: Path, tmp_path: Path, precision: str
) -> None:
    out = tmp_path / "engine.onnx"
    settings = ExportSettings(tree_rows=6, pseudo_rows=(6, 4, 2), chunk=16, precision=precision)
    export(str(tiny_checkpoint), draft_head_transfer, out, settings, lambda _: nullcontext(lambda _: None))
    for path in (out, out.with_name("engine.cpu.onnx")):
        product, weights = head_of(path)
        assert product.op_type == {"int8": "MatMulIntegerToFloat", "int4": "MatMulNBits"}[precision]
        # One has the outputs last, the other first.
        assert weights[product.input[1]].dims[1 if precision == "int8" else 0] == SIZE
    generator = Generator(out, threads=1, adapt=False)
    assert generator.generate("Hello", max_new_tokens=30).tokens
    assert generator.generate("Hello", max_new_tokens=30, sampling=Sampling(temperature=1.0, seed=1)).tokens


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_its_weights_in_the_formats_of_plans(precision: str, tmp_path: Path) -> None:
    model = model_with_head("llama, tied head").eval()
    dims = graph_dims(model.base.config, model.transfer, "float16")
    path, out = tmp_path / "half.onnx", tmp_path / "quantised.onnx"
    ir.save(build_graph(model, torch.float16), path, external_data="half.data")
    quantise(path, out, STORED_IN_PLANS[precision])
    write_for_tensorrt(out, tmp_path / "tensorrt.onnx", dims, plugin=True, decomposable=True)
    expected = record(Reference(model))
    with in_float32(out, dims) as (widened, computed):
        assert difference(OnnxRuntimeEngine(widened, computed, small=True), expected) < 1.0
    product, _ = head_of(out)
    scaled = [one.op_type for one in onnx.load(out).graph.node if product.input[1] in one.output]
    # Blocks of 64 inputs do not fit a model of 32.
    assert scaled == ([] if precision == "int4" else ["DequantizeLinear"])


def test_the_engine_names_its_draft_tokens(draft_head_engine: Path, tiny_engine: Path) -> None:
    about = read_engine_file(draft_head_engine)
    # Earlier releases refuse it, and read those without.
    versions = [json.loads(one.with_suffix(".json").read_text())["version"] for one in (draft_head_engine, tiny_engine)]
    assert versions == [5, 4]
    assert about.dims.draft_size == SIZE
    assert about.draft_tokens is not None
    stored = np.load(draft_head_engine.parent / about.draft_tokens.name)
    assert stored.tolist() == DRAFT_TOKENS
    assert about.parity["largest_relative_difference"] < 1e-4
    assert about.parity["of_the_cpu_graph"] < 1e-4
