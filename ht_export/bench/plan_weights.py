"""`ht-bench plan-weights`: an engine for the CPU with the weights of a quantised plan."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ht_export.graph.lower_cpu import lower_for_cpu
from ht_export.graph.widen import in_float32, write_widened
from ht_export.prompts import evenly, read_conversations
from ht_export.quantize.gptq import second_moments
from ht_export.quantize.precision import STORED_IN_PLANS
from ht_export.quantize.weights import quantise
from ht_export.settings import CALIBRATION_TEXTS, CALIBRATION_TOKENS
from ht_export.staging import check_out, put_in_place, staging_folder
from runtime import Generator
from runtime.bundle.engine_file import FileRecord, read_engine_file
from runtime.bundle.placing import CPU_SUFFIX
from runtime.errors import InputError
from runtime.program import pathname

DESCRIPTION = """
Write an engine for the CPU with the weights of a quantised plan: it tells, without a GPU, what rounding them costs.

    ht-export smollm2-135m --precision fp16 --out fp16/fp16.onnx
    ht-bench plan-weights fp16/fp16.onnx --precision int4 --out int4/int4.onnx
    ht-bench precisions --prompts prompts.jsonl fp16/fp16.onnx int4/int4.onnx

The graph is the one that the plan would be built from, but that weights are multiplied by their scales beforehand and
that it computes in float32. Only its text tells something; its speed and its size do not.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ht-bench plan-weights`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(work=run, interrupted="interrupted; nothing was written")
    parser.add_argument("engine", type=pathname, help="an .onnx engine of --precision fp16")
    parser.add_argument("--precision", choices=STORED_IN_PLANS, required=True, help="of the plan's weights")
    parser.add_argument("--calibrate", type=pathname, metavar="PROMPTS", help="as in ht-export")
    parser.add_argument("--out", type=pathname, required=True, help="engine file to write (.onnx)")


def run(options: argparse.Namespace) -> int:
    """Write the engine; return the exit status. Raises `InputError`."""
    write(options.engine, options.precision, options.calibrate, options.out)
    return 0


def write(engine: Path, precision: str, calibrate: Path | None, out: Path) -> None:
    """Write the engine to `out`. Raises `InputError`."""
    about = read_engine_file(engine)
    if about.dims.dtype != "float16" or about.plan:
        raise InputError(f"{engine} is not an .onnx engine in float16; export one with --precision fp16")
    check_out(out)
    texts = _texts(engine, calibrate)
    dims = replace(about.dims, dtype="float32")
    with staging_folder(out) as folder:
        staged, quantised, folded = (folder / f"{name}.onnx" for name in (out.stem, "quantised", "folded"))
        storage = STORED_IN_PLANS[precision]
        if texts:
            with in_float32(engine, about.dims) as (graph, computed):
                quantise(engine, quantised, storage, second_moments(graph, computed, texts))
        else:
            quantise(engine, quantised, storage)
        weights = folder / f"{staged.name}.data"
        fold_weights(quantised, folded, weights.name)
        write_widened(folded, staged)
        lowered = staged.with_name(f"{out.stem}{CPU_SUFFIX}")
        model = ir.load(staged)
        lower_for_cpu(model, dims)
        ir.save(model, lowered)
        for path in (quantised, folded, folder / f"{quantised.name}.data"):
            path.unlink()
        beside: dict[str, Any] = {}
        for field in ("tokenizer", "chat_template", "correction", "draft_tokens"):
            record = getattr(about, field)
            if record is not None:
                copied = folder / record.name.replace(engine.stem, out.stem, 1)
                with record.open(engine, contents=True) as source, copied.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                beside[field] = FileRecord.of(copied)
        method = "GPTQ" if texts else "round to nearest"
        description = replace(
            about,
            dims=dims,
            precision=f"{precision} of plans",
            graph=FileRecord.of(staged),
            cpu_graph=FileRecord.of(lowered),
            weights=FileRecord.of(weights),
            parity={"quantisation": {"method": method, "texts": len(texts)}},
            **beside,
        )
        put_in_place(folder, out, description)


def fold_weights(graph: Path, out: Path, weights: str) -> None:
    """Write the graph with stored weights times their scales, in float32, in the place of both; all weights go to the
    file `weights` beside it.
    """
    model = ir.load(graph)
    ir.external_data.load_to_model(model)
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear":
            folded = _folded(node, model)
            model.graph.register_initializer(folded)
            ir.convenience.replace_all_uses_with(node.outputs[0], folded)
            model.graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)
    ir.save(model, out, external_data=weights)


def _folded(node: ir.Node, model: ir.Model) -> ir.Value:
    """Return what ONNX Runtime says that `node` computes with scales in float32."""
    stored, scales = (value.const_value for value in node.inputs if value is not None)
    assert stored is not None and scales is not None
    inputs = [
        ir.val("stored", const_value=stored),
        ir.val("scales", const_value=ir.tensor(scales.numpy().astype(np.float32), name="scales")),
    ]
    alone = ir.node("DequantizeLinear", inputs, dict(node.attributes))
    (output,) = alone.outputs
    output.name, output.dtype, output.shape = "weights", ir.DataType.FLOAT, node.outputs[0].shape
    opsets = {"": model.opset_imports[""]}
    graph = ir.Graph([], [output], nodes=[alone], initializers=inputs, opset_imports=opsets, name="weights")
    session = onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    (array,) = session.run(None, {})
    name = f"{node.outputs[0].name}.folded"
    return ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))


def _texts(engine: Path, calibrate: Path | None) -> list[list[int]]:
    """Return the tokens of texts to calibrate on, those of `ht-export`."""
    if calibrate is None:
        return []
    generator = Generator(engine)
    prompts = [one.turns[0] for one in evenly(read_conversations(calibrate), CALIBRATION_TEXTS)]
    return [generator.encode(prompt)[:CALIBRATION_TOKENS] for prompt in prompts]
