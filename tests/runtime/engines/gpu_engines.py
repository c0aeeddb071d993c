"""Engines for the simulated GPU: plans made of an ONNX engine, and what ONNX Runtime is replaced by."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import pytest

from ht_export.tensorrt.limits import profiles
from plugins.binaries import CHOOSE, CHOOSE_DRAFTS, COMMIT, COMMIT_ENTRY, Kernel, KernelBinaries
from runtime.bundle.engine_file import EngineFile, FileRecord, Limits, PlanFile, read_engine_file
from runtime.bundle.places import engine_file_path
from runtime.engines import device_cache, onnxruntime_cuda
from runtime.engines.external_weights import GraphFiles
from runtime.engines.onnxruntime import open_session
from runtime.engines.onnxruntime_cuda import PROVIDER, OnnxRuntimeCudaEngine
from tests.runtime.engines.simulated_gpu import SimulatedDriver, simulated_tensorrt

LIMITS = Limits(max_batch=1, max_context=200, max_rows=12, chunk=16)


def make_plan(
    engine: Path, folder: Path, limits: Limits, monkeypatch: pytest.MonkeyPatch, entry: str = COMMIT_ENTRY
) -> Path:
    """Return the engine as a plan in `folder`, whose kernel for commits is called `entry`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    # The tiny model's context would never need a second size.
    monkeypatch.setattr(device_cache, "SMALLEST_CAPACITY", 16)
    about = read_engine_file(engine)
    shutil.copytree(engine.parent, folder / "plan")
    (folder / "plan" / "engine.onnx").unlink()
    path = folder / "plan" / "engine.plan"
    path.write_text(str(engine))
    kernels = path.with_name("engine.kernels.bin")
    kernels.write_bytes(kernels_of(about, with_choices=True, commit=entry))
    made = profiles(about.dims, limits, about.tree)
    described = PlanFile(
        product="tensorrt-rtx",
        version="1.7.1.116",
        compute_capabilities=((8, 0),),
        attention="native",
        plugin_version=None,
        limits=limits,
        profiles={profile.name: {name: list(map(list, r)) for name, r in profile.shapes.items()} for profile in made},
        kernels=FileRecord.of(kernels),
        build={},
    )
    record = FileRecord.of(path)
    replace(about, graph=record, weights=None, max_context=limits.max_context, plan=described).write(
        engine_file_path(path)
    )
    return path


def kernels_of(about: EngineFile, *, with_choices: bool, commit: str = COMMIT_ENTRY) -> bytes:
    """Return a plan's kernels, with those for choices or without."""
    names = {COMMIT: commit}
    if with_choices:
        for variants in (CHOOSE, *([CHOOSE_DRAFTS] if about.dims.draft_size else [])):
            names |= dict(zip(variants, ("peak_kernel", "weigh_kernel", "collect_kernel"), strict=True))
    kernels = {variant: Kernel(name, 32, 0, b"\x7fELF") for variant, name in names.items()}
    return KernelBinaries("float32", about.dims.head_dim, {80: kernels}).to_bytes()


def use_gpu(plan: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> SimulatedDriver:
    """Let `cuda.bindings` and `tensorrt_rtx` be those of a simulated GPU."""
    about = read_engine_file(plan)
    assert about.plan is not None
    driver = use_driver(plan, monkeypatch, **options)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", simulated_tensorrt(driver, about.dims, about.plan))
    return driver


def use_driver(engine: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> SimulatedDriver:
    """Let `cuda.bindings` be that of a simulated GPU."""
    driver = SimulatedDriver(read_engine_file(engine).dims, **options)
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return driver


def use_gpu_of_onnxruntime(engine: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> SimulatedDriver:
    """Let ONNX Runtime run on a simulated GPU: the session is the CPU's, and runs when the stream does."""
    driver = use_driver(engine, monkeypatch, **options)
    monkeypatch.setattr(device_cache, "SMALLEST_CAPACITY", 16)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(OnnxRuntimeCudaEngine, "device", "cpu")

    class Session:
        def __init__(self, graph: GraphFiles, providers: list[Any]) -> None:
            ((name, options), _) = providers
            assert (name, options) == (PROVIDER, {"device_id": "0", "user_compute_stream": "7", "use_tf32": "0"})
            self._session = open_session(graph, ["CPUExecutionProvider"])

        def get_inputs(self) -> list[Any]:
            return list(self._session.get_inputs())

        def get_outputs(self) -> list[Any]:
            return list(self._session.get_outputs())

        def get_providers(self) -> list[str]:
            return [PROVIDER]

        def io_binding(self) -> Any:
            return self._session.io_binding()

        def run_with_iobinding(self, binding: Any) -> None:
            driver.enqueue(lambda: self._session.run_with_iobinding(binding))

    monkeypatch.setattr(onnxruntime_cuda, "open_session", Session)
    return driver
