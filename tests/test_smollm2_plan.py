"""TensorRT plans of SmolLM2-135M with its real weights, built without a GPU."""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext

import pytest

from ht_export.export import ExportSettings, export
from ht_export.model.known import KNOWN_MODELS
from ht_export.tensorrt.planner import Planner, PlanSettings
from runtime.bundle.engine_file import PlanFile, read_engine_file

KNOWN = KNOWN_MODELS["smollm2-135m"]
LAYERS = 30
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (12, 0))

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("triton")
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(importlib.util.find_spec(KNOWN.package) is None, reason=f"not installed: {KNOWN.pip_line}"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PlanFile]:
    """Builds with one kind of attention, from one graph in half precision: tracing it takes longer than a build."""
    graph = tmp_path_factory.mktemp("smollm2") / "engine.onnx"
    settings = ExportSettings(tree_rows=16, pseudo_rows=(16, 16, 16, 16), precision="fp16")
    export("smollm2-135m", None, graph, settings, lambda _: nullcontext(lambda _: None))

    def build(attention: str) -> PlanFile:
        about = read_engine_file(graph)
        planner = Planner(PlanSettings("tensorrt-rtx", capabilities=CAPABILITIES, attention=attention))
        weights = (graph.parent / "engine.onnx.data").stat().st_size
        prepared = planner.prepare(about.dims, about.tree, (256, None), about.max_context, weights, graph.parent)
        plan = graph.with_name(f"{attention}.plan")
        described = prepared.build(graph, prepared.compile(graph, lambda *_: None), plan, lambda _: None)
        assert weights < plan.stat().st_size < 1.5 * weights
        plan.unlink()
        return described

    return build


def test_every_layer_has_our_tree_attention(build: Callable[[str], PlanFile]) -> None:
    plan = build("plugin")
    assert plan.compute_capabilities == CAPABILITIES
    # Counted after parsing, and in the engine: one for each profile.
    assert plan.build["plugin_layers"] == LAYERS
    assert plan.build["engine_layers"]["custom_layer"] == 2 * LAYERS


def test_every_layer_has_fused_native_attention(build: Callable[[str], PlanFile]) -> None:
    plan = build("native")
    assert plan.build["plugin_layers"] == 0
    assert plan.build["fused_attention_layers"] == LAYERS
