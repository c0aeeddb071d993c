"""Opening an engine: which of them runs the files at hand on the device asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.bundle.engine_file import EngineFile, PlanFile
from runtime.bundle.reading import KERNELS, EngineFiles
from runtime.engines.external_weights import GraphFiles
from runtime.engines.protocol import Engine
from runtime.errors import InputError, shown

if TYPE_CHECKING:
    from plugins.binaries import KernelBinaries


def runs_on_cpu(about: EngineFile, device: str | None) -> bool:
    """Return whether an engine runs on the CPU when `device` is asked for."""
    return about.plan is None and (device is None or not device.startswith("cuda"))


def open_engine(
    files: EngineFiles,
    about: EngineFile,
    device: str | None = None,
    threads: int | None = None,
    gpu_memory_bytes: int | None = None,
) -> Engine:
    """Return the engine of `files`, which `about` describes, on "cpu", "cuda" or "cuda:1", the second GPU; None is the
    CPU, but for plans.

    `threads` are of the CPU, `gpu_memory_bytes` of a GPU, for keys and values. Raises `EngineFileError` when a file is
    damaged, and `InputError` for an engine that cannot run here.
    """
    path = files.path
    gpu = gpu_of(device)
    on_gpu = gpu is not None or about.plan is not None
    if on_gpu and threads is not None:
        raise InputError("threads is for engines on the CPU; leave it out")
    if not on_gpu and gpu_memory_bytes is not None:
        raise InputError("gpu_memory_bytes is for engines on a GPU; leave it out, or give cache_bytes")
    if about.plan is not None:
        if device == "cpu":
            raise InputError(f"{path} is a TensorRT plan, which runs on a GPU only; export an .onnx engine for the CPU")
        return _open_plan(files, about, about.plan, gpu or 0, gpu_memory_bytes)
    if about.dims.dtype == "bfloat16" and not on_gpu:
        raise InputError(
            f"{path} is in bfloat16, in which ONNX Runtime computes on a GPU only; use device cuda, or export it with "
            "--precision fp32 for the CPU"
        )
    graph = GraphFiles(path, files.graph, files.weights)
    if on_gpu:
        from runtime.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine

        return OnnxRuntimeCudaEngine(
            graph,
            about.dims,
            about.tree,
            about.prompt_chunk,
            about.max_context,
            gpu=gpu or 0,
            memory_bytes=gpu_memory_bytes,
        )
    if files.cpu_graph is not None:
        from runtime.engines.onnxruntime_cpu import OnnxRuntimeCpuEngine

        assert about.cpu_graph is not None
        lowered = GraphFiles(path.with_name(about.cpu_graph.name), files.cpu_graph, files.weights)
        return OnnxRuntimeCpuEngine(lowered, about.dims, threads)
    from runtime.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(graph, about.dims, threads)


def gpu_of(device: str | None) -> int | None:
    """Return the number of the GPU that `device` names, None for the CPU. Raises `InputError` for any other name."""
    if device in (None, "cpu"):
        return None
    found = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", device) if isinstance(device, str) else None
    if found is None:
        raise InputError(f"device must be cpu, cuda or a GPU's number such as cuda:1, not {shown(device)}")
    return int(found[1] or 0)


def _open_plan(files: EngineFiles, about: EngineFile, plan: PlanFile, gpu: int, memory_bytes: int | None) -> Engine:
    from runtime.engines.tensorrt import TensorRTEngine

    binaries = parse_kernels(files.kernels, files.path.with_name(plan.kernels.name))
    return TensorRTEngine(
        files.path,
        about.dims,
        plan,
        about.graph.sha256,
        about.tree,
        binaries,
        opened=files.plan,
        gpu=gpu,
        memory_bytes=memory_bytes,
    )


def parse_kernels(content: bytes, where: Path) -> KernelBinaries:
    """Return the kernels of a plan in `content`, which was read at `where`. Raises `EngineFileError`."""
    from plugins.binaries import KernelBinaries

    try:
        return KernelBinaries.from_bytes(content)
    except ValueError as error:
        raise KERNELS.unfit(where, error) from error
