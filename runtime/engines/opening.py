"""Opening an engine: which of them runs the files at hand on the device asked for."""

from __future__ import annotations

from pathlib import Path

from runtime.bundle.engine_file import EngineFile, PlanFile
from runtime.engines.protocol import Engine
from runtime.errors import EngineFileError, InputError
from runtime.formats import Format

KERNELS = Format("kernels.bin", 1 << 26, "export the engine again", EngineFileError)


def runs_on_cpu(about: EngineFile, device: str | None) -> bool:
    """Return whether an engine runs on the CPU when `device` is asked for."""
    return about.plan is None and device != "cuda"


def open_engine(path: Path, about: EngineFile, device: str | None = None, threads: int | None = None) -> Engine:
    """Return the engine at `path`, which `about` describes, on "cpu" or "cuda"; None is the CPU, but for plans.

    `threads` are of the CPU. Raises `EngineFileError` when a file is missing or damaged, and `InputError` for an engine
    that cannot run here.
    """
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, not {device}")
    on_gpu = device == "cuda" or about.plan is not None
    if on_gpu and threads is not None:
        raise InputError("threads is for engines on the CPU; leave it out")
    if about.plan is not None:
        if device == "cpu":
            raise InputError(f"{path} is a TensorRT plan, which runs on a GPU only; export an .onnx engine for the CPU")
        return _open_plan(path, about, about.plan)
    if about.dims.dtype == "bfloat16" and not on_gpu:
        raise InputError(
            f"{path} is in bfloat16, in which ONNX Runtime computes on a GPU only; use device cuda, or export it with "
            "--precision fp32 for the CPU"
        )
    if on_gpu:
        from runtime.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine

        return OnnxRuntimeCudaEngine(path, about.dims, about.tree, about.prompt_chunk, about.max_context)
    if about.cpu_graph is not None:
        from runtime.engines.onnxruntime_cpu import OnnxRuntimeCpuEngine

        lowered = about.cpu_graph.check(path.parent, contents=True)
        return OnnxRuntimeCpuEngine(lowered, about.dims, threads)
    from runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, about.dims, threads)


def _open_plan(path: Path, about: EngineFile, plan: PlanFile) -> Engine:
    from plugins.binaries import KernelBinaries
    from runtime.engines.tensorrt import TensorRTEngine

    kernels, content = plan.kernels.read(path.parent, KERNELS)
    try:
        binaries = KernelBinaries.from_bytes(content)
    except ValueError as error:
        raise KERNELS.unfit(kernels, error) from error
    return TensorRTEngine(path, about.dims, plan, about.graph.sha256, about.tree, binaries)
