"""Loading a TensorRT plan: the library that runs it, and whether version and GPU fit."""

from __future__ import annotations

import importlib
import os
import tempfile
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.engine_file import PlanFile
from runtime.engines.cuda import Cuda
from runtime.errors import EngineFileError, InputError
from runtime.files import atomic_path
from runtime.formats import Format

CACHE = Format("runtime cache", 1 << 30, "delete it, and it is made again")
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Findings of the library's own check of a plan, in words.
DIAGNOSTICS = {
    "VERSION_MISMATCH": "it was built by another version; export it again",
    "UNSUPPORTED_CC": "it was not built for this GPU's compute capability; export it again",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old; update it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old; update it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "CUDA_ERROR": "CUDA reports an error",
    "MALFORMED_ENGINE": "it is damaged; export it again",
}


def import_product(about: PlanFile) -> Any:
    """Return the module that runs the plan. Raises `InputError` when it is missing, `EngineFileError` when it is of
    another version than the plan.
    """
    if about.product not in MODULES:
        raise EngineFileError(f"the plan is for {about.product}, and this release runs plans of {', '.join(MODULES)}")
    try:
        trt = importlib.import_module(MODULES[about.product])
    except Exception as error:
        # Not only what is missing: bindings without their libraries raise what they like.
        raise InputError(
            f"this plan needs {about.product} {about.version}, which cannot be imported ({error}); install it with: "
            f"pip install 'hidden-transfer[{about.product}]'"
        ) from error
    found = str(trt.__version__)
    if found.split(".")[:3] != about.version.split(".")[:3]:
        raise EngineFileError(
            f"this plan was built with {about.product} {about.version}, and {found} is installed; plans run in the "
            f"version that built them: install {about.version}, or export the plan again"
        )
    return trt


def check_device(path: Path, about: PlanFile, cuda: Cuda) -> None:
    """Raise `EngineFileError` when the plan was not built for this GPU."""
    found = cuda.capability
    if about.product == "tensorrt":
        fits = found in about.compute_capabilities
    else:
        # Those that it names and, says its documentation, later ones; the library itself tells more when it loads it.
        fits = found >= min(about.compute_capabilities)
    if not fits:
        built = ", ".join(f"{major}.{minor}" for major, minor in about.compute_capabilities)
        here = f"{found[0]}.{found[1]}"
        again = "on this machine" if about.product == "tensorrt" else f"with --compute-capability {here}"
        raise EngineFileError(
            f"{path} was built for compute capability {built}, and {cuda.name} has {here}; export it again {again}"
        )


def deserialise(
    trt: Any, log: Any, path: Path, about: PlanFile, opened: BufferedReader | None = None
) -> tuple[Any, Any]:
    """Return the library's runtime, which must outlive the engine, and the engine, from the plan at `path`, or from
    that which is `opened`. Raises `EngineFileError`.
    """
    runtime = trt.Runtime(log)
    # Mapped, so that a plan of many GiB is not held in memory twice.
    plan = np.memmap(path if opened is None else opened, dtype=np.uint8, mode="r")
    if hasattr(runtime, "get_engine_validity"):
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.INVALID:
            raise EngineFileError(f"{path} cannot be used here: {_explained(trt, diagnostics) or log.last_errors()}")
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineFileError(
            f"{about.product} {about.version} cannot load {path} ({log.last_errors()}); export it again on this machine"
        )
    return runtime, engine


def _explained(trt: Any, diagnostics: int) -> str:
    found = [
        text
        for name, text in DIAGNOSTICS.items()
        if (flag := getattr(trt.EngineInvalidityDiagnostics, name, None)) is not None and int(diagnostics) & int(flag)
    ]
    return ", ".join(found)


def make_logger(trt: Any) -> Any:
    """Return a logger that keeps the last errors, for messages, and prints nothing."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors = [*self.errors[-4:], (message.strip().splitlines() or [""])[0][:300]]

        def last_errors(self) -> str:
            return "; ".join(self.errors[-2:]) or "it gives no reason"

    return Log()


class RuntimeCache:
    """The kernels that TensorRT for RTX compiles for this GPU when a plan first runs, kept for the next time.

    Elsewhere there is no such thing, and this does nothing. `plan_hash` is the plan's SHA-256.
    """

    def __init__(self, engine: Any, plan_hash: str) -> None:
        self._engine = engine
        self._cache: Any = None
        self._written = 0
        self._path = _cache_home() / "hidden-transfer" / f"{plan_hash[:32]}.runtime-cache"

    def configure(self, config: Any) -> None:
        """Let contexts of this configuration use the cache."""
        if not hasattr(config, "create_runtime_cache"):
            return
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            try:
                held = CACHE.content(self._path)
            except InputError:
                # None yet, or none of use.
                held = b""
            # A cache of another driver or GPU is refused, and made anew.
            if held and self._cache.deserialize(held):
                self._written = len(held)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was added since the last time; where that is not possible, do without."""
        if self._cache is None:
            return
        serialised = self._cache.serialize()
        content = b"" if serialised is None else bytes(serialised)
        if len(content) <= self._written:
            return
        try:
            with atomic_path(self._path) as temporary:
                temporary.write_bytes(content)
            self._written = len(content)
        except InputError:
            self._cache = None


def _cache_home() -> Path:
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        # A user without a home, as in some containers.
        return Path(tempfile.gettempdir())
