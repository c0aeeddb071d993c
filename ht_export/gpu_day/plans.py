"""Part 2: plans, ONNX Runtime and the PyTorch reference, each compared with an fp32 engine on the CPU and timed."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ht_export.gpu_day.models import command, dtypes, export_words, exported, fp32_engine, reference_generator
from ht_export.gpu_day.settings import DaySettings, NotHereError
from ht_export.gpu_day.stages import Sections

PROMPTS, NEW_TOKENS = 8, 64
# Modules of the two products.
PRODUCTS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
ATTENTIONS = ("plugin", "native")
CUDA_PROVIDER = "CUDAExecutionProvider"
TABLE_SECONDS = 40.0


def export_sections(settings: DaySettings) -> Sections:
    """Yield the export of the engine that the others are compared with."""
    yield "fp32 engine", lambda: _export(settings)


def _export(settings: DaySettings) -> dict[str, Any]:
    begun = time.monotonic()
    path = exported(settings)
    return {"engine": path.name, "bytes": sum(one.stat().st_size for one in path.parent.iterdir()),
            "export_seconds": round(time.monotonic() - begun, 1)}  # fmt: skip


def reference(settings: DaySettings) -> Sections:
    """Yield what the PyTorch reference is worth: with the kernel, in CUDA graphs and without."""
    for dtype in dtypes(settings):
        one = _Reference(settings, dtype)
        yield f"{dtype} decoding", one.decoding
        yield f"{dtype} shapes", one.shapes
        yield f"{dtype} against fp32", one.against_fp32
        yield f"{dtype} passes", one.passes
        yield f"{dtype} requests", one.requests
        yield f"{dtype} passes without graphs", one.passes_without_graphs
        one.close()


class _Reference:
    """The PyTorch reference in one type, opened when it is needed."""

    def __init__(self, settings: DaySettings, dtype: str) -> None:
        self._settings = settings
        self._dtype = dtype
        self._opened: Any = None

    def decoding(self) -> dict[str, Any]:
        """Compare speculative text with plain text, and how fast both come."""
        from ht_export.bench.gpu.engines import decode, example_questions

        count, tokens = self._sizes()
        return decode(self._generator(), example_questions(count), tokens)

    def shapes(self) -> dict[str, Any]:
        """Compare a token's logits in passes of several sizes."""
        from ht_export.bench.gpu.passes import compare_shapes

        generator = self._generator()
        return compare_shapes(generator.engine, _limits(generator), self._settings.seed)

    def against_fp32(self) -> dict[str, Any]:
        """Compare logits, and each greedy token, with the fp32 engine on the CPU."""
        from ht_export.bench.gpu.engines import compare_reference, example_questions

        generator = self._generator()
        count, tokens = self._sizes()
        path = fp32_engine(self._settings)
        if not path.with_suffix(".json").is_file():
            raise NotHereError("no fp32 engine to compare with: it was not exported")
        return compare_reference(
            generator, _limits(generator), path, example_questions(count), tokens, self._settings.seed
        )

    def passes(self) -> dict[str, Any]:
        """Time passes over rows and contexts."""
        found = self._times(self._generator())
        return {**found, "refused": getattr(self._generator().engine, "refused", 0)}

    def passes_without_graphs(self) -> dict[str, Any]:
        """Time them with every kernel launched."""
        self._settings.on_gpu_only("passes with CUDA graphs and without")
        self.close()
        return self._times(self._generator(use_graphs=False))

    def requests(self) -> dict[str, Any]:
        """Time steps of several requests."""
        from ht_export.bench.gpu.passes import request_times

        generator = self._generator()
        settings = self._settings.until(TABLE_SECONDS)
        rows = list(request_times(generator.engine, _limits(generator), settings.seed, settings.in_time))
        return {"rows": [row for row in rows if row is not None], "left_out": rows.count(None)}

    def close(self) -> None:
        """Free it."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _times(self, generator: Any) -> dict[str, Any]:
        from ht_export.bench.gpu.passes import pass_times

        settings = self._settings.until(TABLE_SECONDS)
        rows = list(pass_times(generator.engine, _limits(generator), settings.seed, settings.in_time))
        return {"rows": [row for row in rows if row is not None], "left_out": rows.count(None)}

    def _generator(self, *, use_graphs: bool = True) -> Any:
        if self._opened is None:
            most = 2 if self._settings.rehearsal else 64
            self._opened = reference_generator(
                self._settings, self._dtype, adapt=False, max_batch=most, use_graphs=use_graphs
            )
        return self._opened

    def _sizes(self) -> tuple[int, int]:
        return (1, 4) if self._settings.rehearsal else (PROMPTS, NEW_TOKENS)


def _limits(generator: Any) -> Any:
    from ht_export.bench.gpu.torch_engine import MAX_BATCH, MAX_ROWS
    from runtime.bundle.engine_file import Limits

    about = generator.about
    return Limits(MAX_BATCH, about.max_context, MAX_ROWS, about.prompt_chunk)


def plan_sections(settings: DaySettings) -> Sections:
    """Yield plans of both products, with the plugin and the library's own attention, and ONNX Runtime on CUDA."""
    for product in PRODUCTS:
        yield f"{product}: library", partial(_library, product)
        for attention in ATTENTIONS:
            path = settings.work / f"{product}-{attention}" / "engine.plan"
            yield f"{product}, {attention}: build", partial(_build, settings, product, attention, path)
            yield f"{product}, {attention}: engine", partial(_engine, settings, path, f"a plan of {product}")
    yield "onnxruntime: library", _providers
    path = settings.work / "onnxruntime" / "engine.onnx"
    yield "onnxruntime: engine", lambda: _onnxruntime(settings, path)


def _library(product: str) -> dict[str, Any]:
    module = _imported(product)
    return {"version": module.__version__}


def _imported(product: str) -> Any:
    try:
        return importlib.import_module(PRODUCTS[product])
    except Exception as error:
        # Whatever the loader of its libraries raises: the words are what is asked for.
        raise NotHereError(f"{product} cannot be imported: {type(error).__name__}: {error}") from error


def _build(settings: DaySettings, product: str, attention: str, path: Path) -> dict[str, Any]:
    """Build a plan for the GPU here; on a CPU, where TensorRT for RTX can too, for one of compute capability 8.9."""
    _imported(product)
    if settings.rehearsal:
        if product == "tensorrt":
            settings.on_gpu_only("a plan of TensorRT, which builds for the GPU in the machine")
        capability = "8.9"
    else:
        import torch

        capability = ".".join(map(str, torch.cuda.get_device_capability()))
    options = ["--runtime", product, "--attention", attention, "--max-batch", "16"]
    if product == "tensorrt-rtx":
        options += ["--compute-capability", capability]
    found = command(export_words(settings, path, *options), settings.seconds_left())
    return {**found, "compute_capability": capability, "plan_bytes": path.stat().st_size}


def _engine(settings: DaySettings, path: Path, what: str) -> dict[str, Any]:
    """Check and time an engine, as `ht-bench gpu` does."""
    from ht_export.bench.gpu.engines import engine_part

    settings.on_gpu_only(f"executing {what}")
    if not path.with_suffix(".json").is_file():
        raise NotHereError(f"no {path.parent.name}: it was not built")
    judge = exported(settings)
    found: dict[str, Any] = {}
    for name, value in engine_part(path, judge, PROMPTS, NEW_TOKENS, settings.seed):
        found[name] = value
        if not settings.in_time():
            found["stopped"] = f"the time was over after {name}"
            break
    return found


def _providers() -> dict[str, Any]:
    try:
        import onnxruntime
    except Exception as error:
        raise NotHereError(f"onnxruntime cannot be imported: {type(error).__name__}: {error}") from error
    return {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}


def _onnxruntime(settings: DaySettings, path: Path) -> dict[str, Any]:
    if CUDA_PROVIDER not in _providers()["providers"]:
        raise NotHereError(f"the ONNX Runtime here has no {CUDA_PROVIDER}")
    if not path.with_suffix(".json").is_file():
        command(export_words(settings, path, "--precision", "fp16"), settings.seconds_left())
    work: Callable[[], dict[str, Any]] = partial(_engine, settings, path, "a graph on CUDA")
    return work()
