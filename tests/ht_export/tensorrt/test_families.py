"""Plans of families with windows, soft caps, other norms and other rotary embeddings, built without a GPU.

With --long of every tiny model there is, which takes a quarter of an hour.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ht_export.export import UNTRAINED, ExportSettings, export
from ht_export.model.dims import graph_dims
from ht_export.model.reference import HiddenTransferModel
from ht_export.tensorrt.graph import attention_forms, write_for_tensorrt
from ht_export.verify.passes import ReferenceEngine, check, record
from plugins.binaries import Form, KernelBinaries
from runtime.bundle.engine_file import read_engine_file
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.conftest import random_transfer, save_checkpoint
from tests.families import LONGROPE, MODELS, tiny_model
from tests.ht_export.tensorrt.conftest import PLAN

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("triton")

# One with each of what the others do not have.
CHOSEN = ("gemma2", "gemma3", "phi3, partial rotary, window", "stablelm", "cohere2", "olmo2")
WINDOWED = Form(windowed=True)
FORMS = {
    "gemma2": [Form(capped=True), Form(windowed=True, capped=True)],
    "gemma3": [Form(), WINDOWED],
    "mistral, window": [WINDOWED],
    "llama": [Form()],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames and "attention" in metafunc.fixturenames:
        rare = [pytest.param(name, marks=pytest.mark.long) for name in MODELS if name not in CHOSEN]
        metafunc.parametrize("name", [*CHOSEN, *rare])


def wide(name: str) -> dict[str, Any]:
    """Return the settings of heads of 64, which fused attention asks for."""
    settings: dict[str, Any] = {"hidden_size": 256, "head_dim": 64}
    if name == "phi3, longrope":
        # There is one factor for each pair of a head's numbers.
        factors = {key: LONGROPE[key] * 8 for key in ("short_factor", "long_factor")}
        settings["rope_parameters"] = {**LONGROPE, **factors}
    return settings


@pytest.mark.parametrize("attention", ["plugin", "native"])
def test_a_plan_of_every_family_is_built(name: str, attention: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "model", tiny_model(name, **wide(name)))
    out = tmp_path / "engine.plan"
    settings = ExportSettings(tree_rows=4, chunk=16, precision="fp16", max_context=64)
    plan = replace(PLAN, attention=attention)
    export(str(checkpoint), UNTRAINED, out, settings, lambda _: nullcontext(lambda _: None), plan)
    about = read_engine_file(out)
    assert about.plan is not None
    assert about.plan.build["plugin_layers"] == (about.dims.num_layers if attention == "plugin" else 0)
    if name in FORMS and attention == "plugin":
        content = out.read_bytes()
        assert all(form in forms_in(content) for form in FORMS[name])


def forms_in(plan: bytes) -> set[Form]:
    """Return the forms of attention that the kernels in a plan are for."""
    from plugins.binaries import MAGIC

    # A header of twelve bytes, and a stream that tells where it ends.
    start = plan.index(MAGIC)
    stream = zlib.decompressobj()
    stream.decompress(plan[start + 12 :])
    kernels = KernelBinaries.from_bytes(plan[start : len(plan) - len(stream.unused_data)])
    return {variant.form for variant in next(iter(kernels.kernels.values()))}


@pytest.mark.parametrize("name", FORMS)
def test_the_graph_for_native_attention_computes_the_same(name: str, family_engine: Callable[[str], Path]) -> None:
    base = tiny_model(name)
    model = HiddenTransferModel(base, random_transfer((1, 0, 1), base.config.hidden_size)).eval()
    dims = graph_dims(base.config, model.transfer)
    path = family_engine(name) / "engine.onnx"
    written = path.with_name("tensorrt.onnx")
    assert attention_forms(path) == FORMS[name]
    assert write_for_tensorrt(path, written, dims, plugin=False, decomposable=False) == 0
    functions = {function.name for function in onnx.load(written, load_external_data=False).functions}
    capped = {f"Capped{kind}" for kind in ("TreeAttention", "WindowedTreeAttention")}
    assert functions == (capped if name == "gemma2" else {f.name for f in onnx.load(path).functions})
    expected = record(ReferenceEngine(model))
    assert check(OnnxRuntimeEngine(written, dims), expected) < 1e-4
    assert np.isfinite(expected[0].outputs.logits).all()
