"""All that we call in full TensorRT exists, by the recorded API of three versions; see `tests/data/tensorrt-api`."""

from __future__ import annotations

import ast
import ctypes
import gc
import inspect
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from ht_export.tensorrt import worker
from ht_export.tensorrt.products import Product
from ht_export.tensorrt.worker import BuildError, BuildRequest, BuildResult
from plugins.binaries import Kernel, KernelBinaries, Variant
from plugins.launch import Scores
from plugins.tensorrt_plugin import NAME, NAMES, NAMESPACE, VERSION, WINDOWED_NAME, register
from tests.ht_export.tensorrt.tensorrt_api import Double, describe, signature

ROOT = Path(__file__).parents[3]
RECORDED = sorted((ROOT / "tests/data/tensorrt-api").glob("*.json"))
RTX = "tensorrt-rtx"
PLAN = b"a plan"
KERNELS = KernelBinaries("float16", 64, {80: {Variant(16, False): Kernel("k", 128, 0, b"cubin")}}).to_bytes()
# Shapes of query, new keys and values, cached ones, cache length, mask, output.
SHAPES = [(1, 4, 8, 64), *[(1, 2, 8, 64)] * 2, *[(1, 2, 128, 64)] * 2, (1,), (1, 8, 8), (1, 4, 8, 64)]
GRAPH = """<ir_version: 10, opset_import: ["": 20]>
g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }"""
PROFILES = [{"input_ids": ((1, 1), (1, 4), (1, 8))}, {"input_ids": ((1, 1), (1, 16), (1, 16))}]


class Library:
    """A double of TensorRT where it calls us: plugins, loggers, monitors, writers."""

    def __init__(self, name: str, api: dict[str, Any]) -> None:
        self.layers = 0
        self.parses = self.builds = True
        self.creators: list[Any] = []
        self.plugins: list[Any] = []
        self.restored: list[Any] = []
        self.initializers: dict[str, tuple[int, int]] = {}
        self.cache_fits = True
        answers: dict[str, Callable[..., Any]] = {
            "IPluginRegistry.all_creators": lambda _: list(self.creators),
            "IPluginRegistry.register_creator": self._register,
            "IPluginRegistry.deregister_creator": self._deregister,
            "PluginFieldCollection.__iter__": lambda fields: iter(vars(fields)["arg0"]),
            "OnnxParser.parse": self._parse,
            "OnnxParser.parse_from_file": self._parse,
            "OnnxParser.parse_model_proto": self._parse,
            "OnnxParser.load_initializer": self._load,
            "OnnxParser.num_errors": lambda _: 1,
            "OnnxParser.get_error": lambda *_: self.trt.new("ParserError"),
            "ParserError.node_name": lambda _: "/layer/Cut",
            "ParserError.node_operator": lambda _: "Cut",
            "ParserError.desc": lambda _: "no importer\nat line 1",
            "INetworkDefinition.num_layers": lambda _: 1 + len(self.plugins),
            "INetworkDefinition.get_layer": self._layer,
            "IBuilderConfig.set_timing_cache": lambda *_: self.cache_fits,
            "ITimingCache.serialize": lambda _: self._memory(b"timings"),
            "Builder.build_serialized_network": self._build,
            "Builder.build_serialized_network_to_stream": self._stream,
        }
        self.trt: Any = Double(name, api, answers)

    def _register(self, _: Any, creator: Any, *space: Any) -> bool:
        self.creators.append(creator)
        return True

    def _deregister(self, _: Any, creator: Any) -> bool:
        self.creators.remove(creator)
        return True

    def _parse(self, *_: Any) -> bool:
        # Initializers that were loaded must still be there.
        for address, size in self.initializers.values():
            ctypes.string_at(address, size)
        trt = self.trt
        single = trt.PluginFieldType.FLOAT32
        scale = trt.PluginField("scale", np.array([0.125], np.float32), single)
        build = trt.TensorRTPhase.BUILD
        if any(creator.name in NAMES for creator in self.creators):
            # The first layer has a window and a soft cap.
            self.plugins = [
                self._creator(NAME if layer else WINDOWED_NAME).create_plugin(
                    "node",
                    [scale, trt.PluginField("softcap", np.array([0.0 if layer else 30.0], np.float32), single)],
                    build,
                )
                for layer in range(self.layers)
            ]
        return self.parses

    def _creator(self, name: str) -> Any:
        (found,) = (one for one in self.creators if (one.name, one.plugin_namespace) == (name, NAMESPACE))
        return found

    def _load(self, _: Any, name: str, data: int, size: int) -> bool:
        self.initializers[name] = (data, size)
        return True

    def _layer(self, _: Any, index: int) -> Any:
        kind = self.trt.LayerType.PLUGIN_V3 if index < len(self.plugins) else self.trt.LayerType.CAST
        return self.trt.new("ILayer", type=kind)

    def _memory(self, data: bytes) -> Any:
        class Memory(self.trt.IHostMemory, bytes):  # type: ignore[name-defined]
            nbytes = property(len)

        return bytes.__new__(Memory, data)

    def _stream(self, builder: Any, network: Any, config: Any, writer: Any) -> bool:
        # The bindings document write(data, size), and pass the data alone.
        return self._build(builder, network, config) is not None and all(
            writer.write(part) == len(part) for part in (PLAN[:2], PLAN[2:])
        )

    def _build(self, builder: Any, network: Any, config: Any) -> Any:
        severity = self.trt.ILogger.Severity
        if not self.builds:
            builder.logger.log(severity.ERROR, "no tactic")
            return None
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        assert monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        for plugin in self.plugins:
            self._ask(plugin)
        builder.logger.log(severity.WARNING, "slow")
        builder.logger.log(severity.VERBOSE, "Layers:\nName: a, LayerType: kgen, Inputs: []")
        return self._memory(PLAN)

    def _ask(self, plugin: Any) -> None:
        trt, kinds = self.trt, self.trt.PluginCapabilityType
        elements = [trt.float16] * 5 + [trt.int64, trt.bool, trt.float16]
        described = list(zip(SHAPES, elements, strict=True))
        if plugin.plugin_name == WINDOWED_NAME:
            described.insert(-1, ((1, 8), trt.int64))
        tensors = [self._tensor(shape, element) for shape, element in described]
        inputs, outputs = tensors[:-1], tensors[-1:]
        elements = [tensor.desc.type for tensor in tensors]
        count = len(inputs)
        plugin = plugin.clone()
        core, build, runtime = (
            plugin.get_capability_interface(kind) for kind in (kinds.CORE, kinds.BUILD, kinds.RUNTIME)
        )
        assert isinstance(core, trt.IPluginV3OneCore)
        assert (core.plugin_version, core.plugin_namespace) == (VERSION, NAMESPACE)
        assert isinstance(build, trt.IPluginV3OneBuild)
        assert build.num_outputs == len(outputs)
        assert build.get_output_data_types(elements[:-1]) == [trt.float16]
        shapes = build.get_output_shapes([trt.DimsExprs() for _ in inputs], [], trt.IExprBuilder())
        assert [type(shape) for shape in shapes] == [trt.DimsExprs]
        assert all(build.supports_format_combination(i, tensors, count) for i in range(len(tensors)))
        tensors[0].desc.type = trt.bfloat16
        assert not build.supports_format_combination(0, tensors, count)
        tensors[0].desc.type = trt.float16
        tensors[-2].desc.type = trt.int32
        assert not build.supports_format_combination(count - 1, tensors, count)
        build.configure_plugin(inputs, outputs)
        assert build.get_workspace_size(inputs, outputs) >= 0
        assert isinstance(runtime, trt.IPluginV3OneRuntime)
        for tactic in build.get_valid_tactics():
            runtime.set_tactic(tactic)
        runtime.on_shape_change([tensor.desc for tensor in inputs], [tensor.desc for tensor in outputs])
        fields = runtime.get_fields_to_serialize()
        again = self._creator(core.plugin_name).create_plugin("node", list(fields), trt.TensorRTPhase.RUNTIME)
        self.restored.append(again.attach_to_context(None))

    def _tensor(self, shape: tuple[int, ...], element: Any) -> Any:
        tensor, desc = self.trt.DynamicPluginTensorDesc(), self.trt.PluginTensorDesc()
        desc.dims, desc.type, desc.format = shape, element, self.trt.TensorFormat.LINEAR
        tensor.desc, tensor.min, tensor.opt, tensor.max = desc, shape, shape, shape
        return tensor


@pytest.fixture(params=[*(path.stem for path in RECORDED), RTX])
def library(request: pytest.FixtureRequest) -> Library:
    if request.param == RTX:
        # Where real builds are tested too: what they do, the double must allow.
        return Library("tensorrt_rtx", describe(pytest.importorskip("tensorrt_rtx")))
    path = ROOT / f"tests/data/tensorrt-api/{request.param}.json"
    return Library("tensorrt", json.loads(path.read_text(encoding="utf-8")))


def build(library: Library, folder: Path, *, plugin_layers: int = 0, expected: int | None = None) -> BuildResult:
    """Build in `folder`, where the timing cache stays."""
    path = folder / "tensorrt.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), path, save_as_external_data=True, location="weights", size_threshold=0)
    library.layers = plugin_layers
    kernels = folder / "kernels.bin"
    kernels.write_bytes(KERNELS)
    is_rtx = library.trt.__name__ == "tensorrt_rtx"
    request = BuildRequest(
        product=RTX if is_rtx else "tensorrt",
        graph=str(path),
        plan=str(folder / "engine.plan"),
        result=str(folder / "result.json"),
        capabilities=[(8, 0), (8, 9)] if is_rtx else [(9, 0)],
        profiles=PROFILES,
        kernels=str(kernels) if plugin_layers else None,
        plugin_layers=plugin_layers if expected is None else expected,
        timing_cache=str(folder / "timing.cache"),
    )
    result, events = BuildResult(warnings=[]), []
    product = Product(request.product, library.trt, library.trt.__version__)
    worker.build(product, request, result, lambda **event: events.append(event))
    assert {"phase": "Building", "step": 1, "steps": 2} in events
    assert events[-1] == {"phase": "Building", "step": 2, "steps": 2}
    return result


def test_a_build_with_native_attention(library: Library, tmp_path: Path) -> None:
    trt = library.trt
    result = build(library, tmp_path)
    assert (tmp_path / "engine.plan").read_bytes() == PLAN
    assert result.network_layers == {"CAST": 1}
    assert result.engine_layers == ["Name: a, LayerType: kgen, Inputs: []"]
    assert result.warnings == ["slow"]
    # Every version has the flag, and 11 another number for it.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert trt.called("Builder.create_network") == [{"flags": typed}]
    assert typed == (2 if trt.__version__.startswith("10.") else 1)
    shapes = [profile["input_ids"] for profile in PROFILES]
    assert trt.called("IOptimizationProfile.set_shape") == [
        {"input": "input_ids", "min": least, "opt": usual, "max": most} for least, usual, most in shapes
    ]
    assert len(trt.called("IBuilderConfig.add_optimization_profile")) == 2
    assert not trt.called("IPluginRegistry.register_creator")
    capabilities = [name for name, _ in trt.calls if "compute_capabilit" in name]
    assert len(capabilities) == (3 if trt.__name__ == "tensorrt_rtx" else 0)


def test_a_build_with_the_plugin(library: Library, tmp_path: Path) -> None:
    # As full TensorRT has it, others' plugins are registered already, some of old kinds.
    other = library.trt.kinds["IPluginCreator"]()
    other.name, other.plugin_namespace = "Other", ""
    library.creators = [other]
    for _ in range(2):
        result = build(library, tmp_path, plugin_layers=2)
    assert result.network_layers == {"PLUGIN_V3": 2, "CAST": 1}
    assert [creator.name for creator in library.creators] == ["Other", *NAMES]
    restored = [(plugin.plugin_name, plugin.scores, plugin.kernels) for plugin in library.restored]
    assert restored == [(WINDOWED_NAME, Scores(0.125, 30.0), KERNELS), (NAME, Scores(0.125), KERNELS)] * 2
    bases = {"IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One"}
    assert bases <= {name.removesuffix(".__init__") for name, _ in library.trt.calls}
    check_overrides(library.trt, {"Log", "Monitor", "TreeAttentionPlugin", "TreeAttentionCreator"})


def check_overrides(trt: Double, expected: set[str]) -> None:
    """Check that classes of ours have every method that the library calls, with the arguments that it documents."""
    derived = {kind.__name__: kind for kind in trt.derived}
    assert expected <= set(derived)
    for kind in derived.values():
        for base in [base.__name__ for base in kind.__mro__ if "double" in vars(base)]:
            for name, (documented, *_) in trt.api["classes"][base]["methods"].items():
                if name in ("__init__", "destroy"):
                    continue
                assert name in vars(kind), f"{kind.__name__} lacks {name}{documented}"
                # See `Library._stream`.
                arguments = ["data"] if (base, name) == ("IStreamWriter", "write") else signature(documented).parameters
                ours = list(inspect.signature(vars(kind)[name]).parameters)[1:]
                assert len(ours) == len(arguments), f"{kind.__name__}.{name}({', '.join(ours)}) is for {documented}"


def test_what_a_plugin_serializes_outlives_the_call_that_returns_it(library: Library) -> None:
    # The bindings copy the fields' addresses, and let go of the arrays before the library reads them.
    trt = library.trt
    register(trt, KERNELS)
    library.layers = 1
    library._parse(None)
    fields = list(library.plugins[0].get_fields_to_serialize())
    owners = [weakref.ref(field.data) for field in fields if field.data.base is None]
    trt.calls.clear()
    del fields
    gc.collect()
    assert all(owner() is not None for owner in owners)


def test_a_plugin_that_the_graph_does_not_name(library: Library, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="1 attention layers became the plugin, and 2 should have"):
        build(library, tmp_path, plugin_layers=1, expected=2)


def test_what_the_parser_and_the_builder_refuse_is_told(library: Library, tmp_path: Path) -> None:
    library.builds = False
    with pytest.raises(BuildError, match="cannot build the plan: no tactic"):
        build(library, tmp_path)
    library.parses = False
    with pytest.raises(BuildError, match=r"cannot read the graph: /layer/Cut \(Cut\): no importer$"):
        build(library, tmp_path)


def test_timings_are_kept_and_those_of_another_gpu_replaced(library: Library, tmp_path: Path) -> None:
    build(library, tmp_path)
    library.cache_fits = False
    build(library, tmp_path)
    held = [call["serialized_timing_cache"] for call in library.trt.called("IBuilderConfig.create_timing_cache")]
    assert held == [b"", b"timings", b""]
    assert (tmp_path / "timing.cache").read_bytes() == b"timings"


def used(trt: Double) -> dict[str, dict[str, tuple[Any, ...] | None]]:
    """Return what the runtime uses: arguments of a call, or None for a property."""
    plan, strategy = np.zeros(4, np.uint8), trt.ExecutionContextAllocationStrategy.USER_MANAGED
    names: dict[str, dict[str, tuple[Any, ...] | None]] = {
        "Runtime": {"deserialize_cuda_engine": (plan,)},
        "ICudaEngine": {
            "create_execution_context": (strategy,),
            "create_runtime_config": (),
            "device_memory_size_v2": None,
            "get_tensor_profile_shape": ("input_ids", 1),
        },
        "IExecutionContext": {
            "set_device_memory": (4096, 256),
            "set_optimization_profile_async": (1, 7),
            "set_input_shape": ("input_ids", (1, 4)),
            "set_tensor_address": ("input_ids", 4096),
            "execute_async_v3": (7,),
        },
        "IRuntimeConfig": {"set_execution_context_allocation_strategy": (strategy,)},
    }
    # Each is asked for with `hasattr`, itself or the class that it needs.
    if trt.__name__ == "tensorrt_rtx":
        names["Runtime"]["get_engine_validity"] = (plan,)
        names["IExecutionContext"]["is_stream_capturable"] = (7,)
        names["IRuntimeConfig"] |= {"create_runtime_cache": (), "set_runtime_cache": (trt.new("IRuntimeCache"),)}
        names["IRuntimeConfig"]["dynamic_shapes_kernel_specialization_strategy"] = None
        names["IRuntimeCache"] = {"deserialize": (b"",), "serialize": ()}
    return names


def test_the_runtime_finds_what_it_uses(library: Library) -> None:
    trt = library.trt
    trt.Runtime(trt.ILogger())
    for kind, names in used(trt).items():
        for name, arguments in names.items():
            found = getattr(trt.new(kind), name)
            if arguments is not None:
                found(*arguments)
    gates = ("ComputeCapability", "DynamicShapesKernelSpecializationStrategy", "EngineValidity", "IRuntimeCache")
    assert [hasattr(trt, name) for name in gates] == [trt.__name__ == "tensorrt_rtx"] * len(gates)


def test_nothing_that_the_runtime_uses_is_missing_above(library: Library) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "runtime/engines").glob("*.py")]
    nodes = [node for text in texts if "trt." in text for node in ast.walk(ast.parse(text))]
    # All objects here have names; plans are not serialized again.
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)} - {"__init__", "name", "serialize"}
    for kind, names in used(library.trt).items():
        about = library.trt.api["classes"][kind]
        assert attributes & (about["methods"].keys() | about["properties"].keys()) <= names.keys()


WRONG = {
    "an argument too few": (TypeError, lambda trt: trt.Builder()),
    "an unknown keyword": (TypeError, lambda trt: trt.PluginField("scale", values=np.zeros(1))),
    "an argument of another type": (TypeError, lambda trt: trt.PluginField("scale", np.zeros(1), 1)),
    "no constructor": (TypeError, lambda trt: trt.ICudaEngine()),
    "an unknown attribute": (AttributeError, lambda trt: trt.PluginTensorDesc().shape),
    "an unknown attribute set": (AttributeError, lambda trt: setattr(trt.PluginTensorDesc(), "shape", (1,))),
    "a property of another type": (TypeError, lambda trt: setattr(trt.PluginTensorDesc(), "type", 1)),
    "an unknown member": (AttributeError, lambda trt: trt.LayerType.PLUGIN_V9),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_double_refuses_what_the_bindings_refuse(case: str) -> None:
    module = pytest.importorskip("tensorrt_rtx")
    for trt in (module, Library("tensorrt_rtx", describe(module)).trt):
        error, call = WRONG[case]
        with pytest.raises(error):
            call(trt)
