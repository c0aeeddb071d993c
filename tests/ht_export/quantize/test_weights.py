"""Weights in 8 and 4 bits: what is stored, what ONNX Runtime reads of it, and engines exported so."""

import errno
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ht_export import cli
from ht_export import export as export_module
from ht_export.export import UNTRAINED, ExportSettings, Untrained, export
from ht_export.graph import trace as trace_module
from ht_export.graph.lower_cpu import lower_for_cpu
from ht_export.graph.trace import build_graph
from ht_export.model.dims import graph_dims
from ht_export.model.reference import HiddenTransferModel
from ht_export.quantize.formats import NBits, Storage
from ht_export.quantize.grid import BLOCK, packed_blocks
from ht_export.quantize.precision import STORED
from ht_export.quantize.weights import quantise
from ht_export.verify.passes import LoweredEngine, check, compare, difference, record
from runtime import Generator, Sampling
from runtime.bindings import GraphDims
from runtime.bundle.engine_file import read_engine_file
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import InputError
from runtime.tree import TreeSizes
from tests.conftest import random_transfer, tiny_llama


def dequantised(packed: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, bits: int) -> np.ndarray:
    """Return the weights [N, K, K filled up to blocks] that `MatMulNBits` is documented to take these for."""

    def values(array: np.ndarray) -> np.ndarray:
        halves = [array & 15, array >> 4]
        return array if bits == 8 else np.stack(halves, axis=-1).reshape(*array.shape[:-1], -1)

    rows, blocks = scales.shape
    zeros = values(zero_points)[:, :blocks, None].astype(np.float64)
    weights = (values(packed).astype(np.float64) - zeros) * scales[..., None]
    return weights.reshape(rows, blocks * BLOCK)


def block_scales(scales: np.ndarray) -> np.ndarray:
    """Return the scale of each weight."""
    return np.repeat(scales, BLOCK, axis=1)


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Weights [N, K] of any size in blocks of any magnitude, some of one sign, some the same, some zero."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = rng.standard_normal((rows, columns))
    for start in range(0, columns, BLOCK):
        block = weights[:, start : start + BLOCK]
        kind = draw(st.sampled_from(["as it is", "one sign", "the same", "zero"]))
        if kind == "one sign":
            block[...] = abs(block)
        elif kind == "the same":
            block[...] = block[:, :1]
        elif kind == "zero":
            block[...] = 0
        block *= draw(st.sampled_from([1e-30, 1e-3, -1.0, 1e6]))
    return weights.astype(np.float32)


@given(matrices(), st.sampled_from([4, 8]))
def test_weights_are_within_half_a_step_and_zero_is_zero(weights: np.ndarray, bits: int) -> None:
    packed, scales, zero_points = packed_blocks(weights, bits)
    blocks = -(-weights.shape[1] // BLOCK)
    assert packed.shape == (len(weights), blocks, BLOCK * bits // 8)
    assert scales.shape == (len(weights), blocks)
    assert zero_points.shape == (len(weights), -(-blocks * bits // 8))
    assert [array.dtype.name for array in (packed, scales, zero_points)] == ["uint8", "float32", "uint8"]
    found = dequantised(packed, scales, zero_points, bits)[:, : weights.shape[1]]
    assert (abs(found - weights) <= 0.5001 * block_scales(scales)[:, : weights.shape[1]]).all()
    assert not found[weights == 0].any()


@settings(max_examples=40, deadline=None)
@given(matrices(), st.sampled_from([4, 8]))
def test_onnx_runtime_reads_weights_so(weights: np.ndarray, bits: int) -> None:
    rows, columns = weights.shape
    parts = packed_blocks(weights, bits)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s", "z"], ["y"], "product", domain="com.microsoft", K=columns, N=rows, bits=bits
    )
    node.attribute.append(helper.make_attribute("block_size", BLOCK))
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [columns, size])]
        for name, size in (("x", columns), ("y", rows))
    )
    initializers = [numpy_helper.from_array(part, name) for part, name in zip(parts, "wsz", strict=True)]
    graph = helper.make_graph([node], "product", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    # Products in float32: rows that each have a single one give the weights themselves.
    (found,) = session.run(None, {"x": np.eye(columns, dtype=np.float32)})
    expected = dequantised(*parts, bits)[:, :columns].T
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


# Weights in blocks, whose rows are rounded block by block.
BLOCKS = {"int8": NBits(8), "int4": NBits(4)}


@pytest.fixture(scope="module", params=list(BLOCKS))
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_engine: Path) -> Path:
    """The tiny engine's graph with weights of so many bits."""
    out = tmp_path_factory.mktemp(request.param) / "engine.onnx"
    quantise(tiny_engine, out, BLOCKS[request.param])
    return out


def bits_of(path: Path) -> int:
    return int(path.parent.name.removeprefix("int")[0])


def products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in ("MatMul", "MatMulNBits")]


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_every_product_with_weights_is_quantised_the_heads_too(quantised: Path, tiny_engine: Path) -> None:
    before, after = onnx.load(tiny_engine), onnx.load(quantised)
    found = products(after)
    assert len(found) == len(products(before)) > 16
    for node in found:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        assert (node.op_type, node.domain) == ("MatMulNBits", "com.microsoft")
        assert attributes["bits"] == bits_of(quantised)
        # Products in int8.
        assert attributes["accuracy_level"] == 4
    # The tied head's weights were transposed, which is not needed any more.
    counts = Counter(node.op_type for node in after.graph.node)
    assert counts["Transpose"] == Counter(node.op_type for node in before.graph.node)["Transpose"] - 1
    onnx.checker.check_model(str(quantised))


def test_each_products_weights_are_the_original_ones_but_for_half_a_step(quantised: Path, tiny_engine: Path) -> None:
    before, after = onnx.load(tiny_engine), onnx.load(quantised)
    originals, stored = initializers(before), initializers(after)
    transposed = {node.output[0]: node.input[0] for node in before.graph.node if node.op_type == "Transpose"}
    for old, new in zip(products(before), products(after), strict=True):
        name = old.input[1]
        weights = originals[name].T if name in originals else originals[transposed[name]]
        packed, scales, zero_points = (stored[part] for part in new.input[1:])
        found = dequantised(packed, scales, zero_points, bits_of(quantised))[:, : weights.shape[1]]
        assert (abs(found - weights) <= 0.5001 * block_scales(scales)[:, : weights.shape[1]]).all()


def test_the_embedding_and_all_that_is_no_product_stay_as_they_were(quantised: Path, tiny_engine: Path) -> None:
    before, after = initializers(onnx.load(tiny_engine)), initializers(onnx.load(quantised))
    kept = before.keys() & after.keys()
    (gather,) = (node for node in onnx.load(quantised).graph.node if node.op_type == "Gather")
    assert gather.input[0] in kept
    for name in kept:
        np.testing.assert_array_equal(before[name], after[name], strict=True)
    weights = [array for array in before.values() if array.ndim == 2]
    left = [name for name in kept if before[name].ndim == 2]
    assert len(weights) > 16
    assert left == [gather.input[0]]


def test_files_shrink(quantised: Path, tiny_engine: Path) -> None:
    def size(path: Path) -> int:
        return path.with_name(f"{path.name}.data").stat().st_size

    bits, embedding = bits_of(quantised), 264 * 32 * 4
    # Whole weights have 32 bits; each block has a scale of as many and a zero point besides. The head is no embedding
    # any more.
    most = (bits + (32 + bits) / BLOCK) / 32
    assert 0.8 * most < (size(quantised) - embedding) / size(tiny_engine) < most


def test_more_bits_are_closer_to_the_original(tiny_engine: Path, tmp_path: Path) -> None:
    dims = read_engine_file(tiny_engine).dims
    expected = record(OnnxRuntimeEngine(tiny_engine, dims, threads=1))
    found = {}
    for precision in STORED:
        graph = tmp_path / precision / "engine.onnx"
        graph.parent.mkdir()
        quantise(tiny_engine, graph, STORED[precision])
        model = ir.load(graph)
        lower_for_cpu(model, dims)
        lowered = graph.with_name("engine.cpu.onnx")
        ir.save(model, lowered)
        found[precision] = difference(LoweredEngine(lowered, dims), expected)
        # Lowered as the original is.
        names = Counter(node.op_type for node in model.graph)
        assert names["SkipSimplifiedLayerNormalization"] == 5
        assert names["MatMul"] == 0
    assert 2 * found["int8"] < found["int4"] < 2


def test_matrices_that_are_equal_share_weights_and_are_quantised_each(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Untrained transfer layers are the identity, all of them; so small, they are one initializer of the graph."""
    out = tmp_path / "engine.onnx"
    settings = ExportSettings(precision="int8", tree_rows=4, chunk=16)
    export(str(tiny_checkpoint), UNTRAINED, out, settings, lambda _: nullcontext(lambda _: None))
    assert len(Generator(out, threads=1, adapt=False).generate("Hello", max_new_tokens=9).tokens) == 9


def test_weights_are_written_over_the_originals(
    tiny_engine: Path, tmp_path: Path, quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = ir.save

    def save_where_there_is_room(model: ir.Model, path: Path, **options: Any) -> None:
        # The disk need not hold both.
        assert not path.with_name(f"{path.name}.data").exists()
        save(model, path, **options)

    monkeypatch.setattr(ir, "save", save_where_there_is_room)
    shutil.copytree(tiny_engine.parent, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "engine.onnx").rename(tmp_path / "whole.onnx")
    quantise(whole, tmp_path / "engine.onnx", BLOCKS[f"int{bits_of(quantised)}"])
    for name in ("engine.onnx", "engine.onnx.data"):
        assert (tmp_path / name).read_bytes() == (quantised.parent / name).read_bytes()


def test_logging_is_left_as_it_was(tiny_engine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def state() -> tuple[int, int, list[logging.Handler]]:
        return logging.root.level, logging.root.manager.disable, list(logging.root.handlers)

    before = state()
    quantise(tiny_engine, tmp_path / "engine.onnx", STORED["int8"])
    assert state() == before
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, tiny_engine: Path) -> None:
    """Spare a test the tracing: the graph of the tiny engine, with its weights in memory."""

    def graph(*_: object, **__: object) -> ir.Model:
        return ir.external_data.load_to_model(ir.load(tiny_engine))

    monkeypatch.setattr(export_module, "build_graph", graph)


def export_tiny(checkpoint: Path, transfer: Path | Untrained, out: Path, precision: str) -> None:
    settings = ExportSettings(tree_rows=6, pseudo_rows=(6, 4, 2), chunk=16, precision=precision)
    export(str(checkpoint), transfer, out, settings, lambda _: nullcontext(lambda _: None))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("precision", list(STORED))
def test_an_engine_from_the_command_line(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    out = tmp_path / "engine.onnx"
    options = ["--transfer", str(tiny_transfer), "--precision", precision, "--out", str(out)]
    assert cli.main([str(tiny_checkpoint), *options]) == 0
    about = read_engine_file(out)
    assert (about.precision, about.dims.dtype) == (precision, "float32")
    assert about.parity["largest_relative_difference"] < 1e-4
    assert about.parity["of_the_cpu_graph"] < 1e-4
    # Not the one above: what is written is not what was compared then.
    assert 1e-3 < about.parity["of_quantised_weights"] < 2
    # Its products round the rows, too.
    on_the_cpu = about.parity["of_quantised_weights_on_the_cpu"]
    assert 1e-3 < on_the_cpu < 2
    message = capsys.readouterr().err.replace("\n", "")
    assert f"within {max(on_the_cpu, about.parity['of_quantised_weights']):.1e} of the PyTorch reference" in message
    records = (about.graph, about.cpu_graph, about.weights, about.tokenizer, about.chat_template, about.correction)
    names = {record.name for record in records if record}
    assert {path.name for path in tmp_path.iterdir()} == names | {"engine.json"}
    for name in ("engine.onnx", "engine.cpu.onnx"):
        graph = onnx.load(tmp_path / name, load_external_data=False).graph
        assert not any(node.op_type == "MatMul" for node in graph.node)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("precision", list(STORED))
def test_speculative_text_is_that_of_plain_decoding_but_where_two_tokens_are_as_good(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, precision: str
) -> None:
    export_tiny(tiny_checkpoint, tiny_transfer, tmp_path / "engine.onnx", precision)
    generator = Generator(tmp_path / "engine.onnx", threads=1)
    agreed = 0
    for prompt in ("Hello there", "x" * 40):
        scored = Sampling(logprobs=2)
        plain = generator.generate(prompt, max_new_tokens=40, speculate=False, sampling=scored)
        for tree in (TreeSizes(6, (6, 4, 2)), TreeSizes(150, (150, 150, 150))):
            found = generator.generate(prompt, max_new_tokens=40, tree=tree).tokens
            pairs = enumerate(zip(found, plain.tokens, strict=True))
            first = next((place for place, (ours, theirs) in pairs if ours != theirs), None)
            agreed += 40 if first is None else first
            if first is not None:
                # A row's last bit may depend on the rows beside it, and a rounding to int8 on that bit.
                assert plain.log_probabilities is not None
                (_, best), (_, second) = plain.log_probabilities[first].best
                assert best - second < 0.1
    assert agreed > 80


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Trace models of one shape once; their weights come afterwards."""
    kept: dict[tuple[object, ...], onnx.ModelProto] = {}
    trace = trace_module._trace

    def traced(model: HiddenTransferModel, dims: GraphDims) -> ir.Model:
        key = model.transfer.layers, model.base.config.tie_word_embeddings, dims
        if key not in kept:
            kept[key] = ir.serde.serialize_model(trace(model, dims))
        return ir.serde.deserialize_model(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_module, "_trace", traced)
        yield


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_are_rounded_from_what_is_stored(
    tmp_path: Path, stored: torch.dtype, is_tied: bool
) -> None:
    base = tiny_llama(num_hidden_layers=1, tie_word_embeddings=is_tied).to(stored)
    model = HiddenTransferModel(base, random_transfer((1, 1))).eval()
    dims = graph_dims(base.config, model.transfer)
    paths = [tmp_path / name / "engine.onnx" for name in ("wide", "as-stored")]
    for path in paths:
        path.parent.mkdir()
        graph = build_graph(model, torch.float32, as_stored=path is paths[1])
        ir.save(graph, path, external_data="engine.onnx.data")
    onnx.checker.check_model(str(paths[1]), full_check=True)
    wide, as_stored = (sum(file.stat().st_size for file in path.parent.iterdir()) for path in paths)
    assert as_stored < 0.65 * wide
    engines = [OnnxRuntimeEngine(path, dims) for path in paths]
    assert check(engines[1], record(engines[0])) < 1e-6
    quantised = []
    for path in paths:
        quantise(path, path.with_name("int8.onnx"), STORED["int8"])
        quantised.append(onnx.load(path.with_name("int8.onnx")).graph)
    assert Counter(node.op_type for node in quantised[0].node) == Counter(node.op_type for node in quantised[1].node)
    wide_values, values = ({one.name: numpy_helper.to_array(one) for one in graph.initializer} for graph in quantised)
    assert values.keys() == wide_values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(value, wide_values[name], err_msg=name, strict=True)


@pytest.mark.usefixtures("traced")
def test_a_full_disk_leaves_nothing_behind(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to_full_disk(graph: Path, out: Path, storage: Storage) -> None:
        assert graph.is_file()
        quantise(graph, out, storage)
        out.with_name("engine.onnx.data").write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "quantise", to_full_disk)
    with pytest.raises(InputError, match=r"cannot write .*engine\.onnx: No space left on device"):
        export_tiny(tiny_checkpoint, tiny_transfer, tmp_path / "engine.onnx", "int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("traced")
def test_weights_that_give_no_numbers_are_not_written(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Path, out: Path, storage: Storage) -> None:
        quantise(graph, out, storage)
        model = onnx.load(out)
        # The head's scales alone: all other outputs are numbers.
        name = [tensor.name for tensor in model.graph.initializer if tensor.name.endswith(".scales")][-1]
        for tensor in model.graph.initializer:
            if tensor.name == name:
                scales = np.full_like(numpy_helper.to_array(tensor), np.nan)
                tensor.CopyFrom(numpy_helper.from_array(scales, name))
        out.with_name("engine.onnx.data").unlink()
        onnx.save(model, out, save_as_external_data=True, location="engine.onnx.data")

    monkeypatch.setattr(export_module, "quantise", broken)
    with pytest.raises(
        InputError, match=r"does not compute what the PyTorch reference does: .*nothing was written, use --precision"
    ):
        export_tiny(tiny_checkpoint, tiny_transfer, tmp_path / "engine.onnx", "int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_that_cannot_be_lowered_has_the_portable_graph_alone_and_runs(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(export_module, "can_be_lowered", lambda _: False)
    export_tiny(tiny_checkpoint, tiny_transfer, tmp_path / "engine.onnx", precision)
    about = read_engine_file(tmp_path / "engine.onnx")
    assert about.cpu_graph is None
    assert not (tmp_path / "engine.cpu.onnx").exists()
    assert ("of_quantised_weights" in about.parity) == (precision == "int8")
    assert "of_the_cpu_graph" not in about.parity
    result = Generator(tmp_path / "engine.onnx", threads=1).generate("Hello", max_new_tokens=10, tree=about.tree)
    assert len(result.tokens) == 10


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("engine.onnx", "fp8", r"--precision fp8: ONNX Runtime has no products .* or give an --out .* \.plan"),
        ("engine.onnx", "int2", "--precision must be one of fp32, fp16, bf16, int8, int4, fp8, not int2"),
        (
            "engine.cpu.onnx",
            "fp32",
            r"the graph for the CPU of another engine would have this name; .*engine-cpu\.onnx",
        ),
    ],
)
def test_engines_that_cannot_be_had(
    tiny_checkpoint: Path, tiny_transfer: Path, tmp_path: Path, name: str, precision: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        export_tiny(tiny_checkpoint, tiny_transfer, tmp_path / name, precision)
    assert not list(tmp_path.iterdir())


def test_differences_that_are_no_numbers_are_told_from_small_ones(tiny_engine: Path) -> None:
    engine = OnnxRuntimeEngine(tiny_engine, read_engine_file(tiny_engine).dims, threads=1)
    expected = record(engine)
    # In the last layer only, behind others that are equal.
    expected[2].outputs.value_new[-1][0, 0, 0, 0] = np.nan
    differences = {(one.case, one.output): one.relative for one in compare(engine, expected)}
    assert differences[("tree", "value_new")] == np.inf
    assert differences[("prompt", "value_new")] == 0
    with pytest.raises(InputError, match="does not compute what the PyTorch reference does"):
        difference(engine, expected)
