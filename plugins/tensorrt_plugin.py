"""Tree attention as TensorRT plugins (`IPluginV3`), for TensorRT and TensorRT for RTX alike.

A node `TreeAttention` or `WindowedTreeAttention` that carries `plugin_namespace` "ht.llm" becomes the plugin of that
name where `register` ran before the graph is parsed. The compiled kernels are a serialized field, so that a plan needs
no compiler, and no Triton, to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from plugins.binaries import KernelBinaries
from plugins.launch import Buffers, Launcher, Scores, Shapes
from plugins.tiling import workspace_limit

# The second has one input more.
NAME, WINDOWED_NAME = "TreeAttention", "WindowedTreeAttention"
NAMES = (NAME, WINDOWED_NAME)
NAMESPACE = "ht.llm"
VERSION = "2"
QUERY, KEY_NEW, VALUE_NEW, KEY_CACHE, VALUE_CACHE, CACHE_LENGTH, TREE_MASK, FIRST_VISIBLE = range(8)


def register(trt: Any, kernels: bytes | None = None) -> list[Any]:
    """Let `trt`, the module `tensorrt` or `tensorrt_rtx`, know the plugins; return their creators.

    `kernels`, of `KernelBinaries.to_bytes`, are what the plugins of a plan that is built now will carry; to run a plan
    none are needed. A second call replaces the first one's creators.
    """
    _make_findable(trt)
    registry = trt.get_plugin_registry()
    # Not get_creator, which logs an error where there is none.
    for present in registry.all_creators:
        if present.name in NAMES and present.plugin_namespace == NAMESPACE:
            registry.deregister_creator(present)
    creators = [_classes(trt)(name, kernels) for name in NAMES]
    for creator in creators:
        if not registry.register_creator(creator, NAMESPACE):
            raise RuntimeError(f"{trt.__name__} {trt.__version__} refused the {creator.name} plugin")
    _kept[trt.__name__] = creators
    return creators


# Reasons that plugins failed to run for: the library reports that one failed, and not why.
failures: list[str] = []
# The registry holds no reference of its own.
_kept: dict[str, list[Any]] = {}


def _make_findable(trt: Any) -> None:
    """Let TensorRT for RTX find itself: without, a plugin aborts the process.

    Its plugin code loads `libtensorrt_rtx.so`, and the wheel ships `libtensorrt_rtx.so.1` only. Raises `RuntimeError`
    when the name that it looks for cannot be made.
    """
    if trt.__name__ != "tensorrt_rtx":
        return
    with contextlib.suppress(OSError):
        # It is found in another installation, or on LD_LIBRARY_PATH.
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
        return
    found = importlib.util.find_spec("tensorrt_rtx_libs")
    for folder in map(Path, (found.submodule_search_locations or ()) if found else ()):
        link = folder / LIBRARY
        for library in sorted(folder.glob(f"{LIBRARY}.*")):
            try:
                if not link.exists():
                    link.symlink_to(library.name)
            except OSError as error:
                raise RuntimeError(
                    f"TensorRT for RTX needs a link {link} to {library.name} for plugins, which cannot be made here "
                    f"({error.strerror}); make it once with: ln -s {library.name} {link}"
                ) from error
            ctypes.CDLL(str(link), mode=ctypes.RTLD_GLOBAL)
            return


# The library's search path begins with its own folder, so that a link there is found.
LIBRARY = "libtensorrt_rtx.so"


@cache
def _classes(trt: Any) -> type:
    """Return the creator's class; its bases come from `trt`, so that it can be made only once that is imported."""

    class TreeAttentionPlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        """One node: what becomes of its scores, and the kernels."""

        def __init__(self, name: str, scores: Scores, kernels: bytes, binaries: KernelBinaries) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.num_outputs = 1
            self.plugin_name = name
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            self.scores = scores
            self.kernels = kernels
            self.binaries = binaries
            self.launcher: Launcher | None = None

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            copy = TreeAttentionPlugin(self.plugin_name, self.scores, self.kernels, self.binaries)
            copy.launcher = self.launcher
            return copy

        def get_output_data_types(self, input_types: list[Any]) -> list[Any]:
            return [input_types[QUERY]]

        def get_output_shapes(self, inputs: list[Any], shape_inputs: list[Any], expressions: Any) -> list[Any]:
            return [trt.DimsExprs(inputs[QUERY])]

        def supports_format_combination(self, position: int, tensors: list[Any], num_inputs: int) -> bool:
            described = tensors[position].desc
            element = trt.float16 if self.binaries.dtype == "float16" else trt.bfloat16
            others = {CACHE_LENGTH: trt.int64, TREE_MASK: trt.bool}
            if num_inputs > FIRST_VISIBLE:
                others[FIRST_VISIBLE] = trt.int64
            wanted = others.get(position, element)
            return described.format == trt.TensorFormat.LINEAR and described.type == wanted

        def configure_plugin(self, inputs: list[Any], outputs: list[Any]) -> None:
            head_dim = inputs[QUERY].desc.dims[3]
            if head_dim != self.binaries.head_dim:
                raise ValueError(
                    f"the kernels are for head size {self.binaries.head_dim}, and the graph has {head_dim}"
                )

        def get_workspace_size(self, inputs: list[Any], outputs: list[Any]) -> int:
            most = _shapes(inputs)
            return workspace_limit(most.batch, most.kv_heads, most.packed_rows, most.head_dim)

        def get_valid_tactics(self) -> list[int]:
            return [1]

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: list[Any], outputs: list[Any]) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            kernels = np.frombuffer(self.kernels, dtype=np.int8)
            scale = np.array([self.scores.scale], dtype=np.float32)
            softcap = np.array([self.scores.softcap], dtype=np.float32)
            # The library gets their addresses, and reads them after this returns.
            self.serialized = (scale, softcap, kernels)
            return trt.PluginFieldCollection(
                [
                    trt.PluginField("scale", scale, trt.PluginFieldType.FLOAT32),
                    trt.PluginField("softcap", softcap, trt.PluginFieldType.FLOAT32),
                    trt.PluginField("kernels", kernels, trt.PluginFieldType.INT8),
                ]
            )

        def enqueue(
            self,
            inputs: list[Any],
            outputs: list[Any],
            input_addresses: list[int],
            output_addresses: list[int],
            workspace: int,
            stream: int,
        ) -> None:
            try:
                if self.launcher is None:
                    self.launcher = _launcher(self.kernels)
                buffers = Buffers(*input_addresses[:FIRST_VISIBLE], *output_addresses, *input_addresses[FIRST_VISIBLE:])
                self.launcher(_shapes(inputs), buffers, workspace, self.scores, stream)
            except Exception as error:
                failures.append(str(error))
                raise

    class TreeAttentionCreator(trt.IPluginCreatorV3One):
        """Makes plugins of nodes and of plans."""

        def __init__(self, name: str, kernels: bytes | None) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = name
            self.plugin_namespace = NAMESPACE
            self.plugin_version = VERSION
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(field, np.array([], dtype=np.float32), trt.PluginFieldType.FLOAT32)
                    for field in ("scale", "softcap")
                ]
            )
            self.kernels = kernels

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            data = {field.name: np.asarray(field.data) for field in fields}
            kernels = data["kernels"].tobytes() if phase == trt.TensorRTPhase.RUNTIME else self.kernels
            if kernels is None:
                raise ValueError("no kernels to build a plan with were registered")
            scale, softcap = (float(data[field].ravel()[0]) for field in ("scale", "softcap"))
            return TreeAttentionPlugin(self.name, Scores(scale, softcap), kernels, _binaries(kernels))

    return TreeAttentionCreator


# All layers of a plan have the same kernels, and each context has plugins of its own.
@cache
def _binaries(kernels: bytes) -> KernelBinaries:
    return KernelBinaries.from_bytes(kernels)


@cache
def _launcher(kernels: bytes) -> Launcher:
    return Launcher(_binaries(kernels))


def _shapes(inputs: list[Any]) -> Shapes:
    """Return the shapes of a call, or at build time the largest ones of the profile."""
    dims = [tuple(getattr(tensor, "max", None) or tensor.dims) for tensor in (inputs[QUERY], inputs[KEY_CACHE])]
    (batch, query_heads, rows, head_dim), (_, kv_heads, capacity, _) = dims
    return Shapes(batch, query_heads, kv_heads, rows, capacity, head_dim)
