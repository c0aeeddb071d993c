"""One build of a plan, in a process of its own: what the library does to a process stays here.

    python -m ht_export.tensorrt.worker REQUEST.json

Writes the plan and `RESULT`; every line of its standard output is one JSON event: {"phase", "step", "steps"}.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import psutil
from msgspec import Meta

from ht_export.tensorrt.products import Capability, Product, find_product
from plugins.tensorrt_plugin import register
from runtime.errors import InputError
from runtime.files import atomic_path
from runtime.formats import Format, JsonFormat

LAYERS_BEGIN = "Layers:"
# Logged wherever there is no GPU, which a build does not need.
NO_GPU = "CUDA driver version is insufficient"


@dataclass(frozen=True)
class BuildRequest:
    """The plan to build. `kernels` is a file with the plugin's kernels; None builds without the plugin."""

    product: str
    graph: str
    plan: str
    result: str
    capabilities: Sequence[Capability]
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]]
    kernels: str | None
    plugin_layers: int
    timing_cache: str | None


@dataclass
class BuildResult:
    """The outcome of a build: `error` None and a plan, or an error and no plan.

    Memory in bytes, resident at its most: all of it, and without what is mapped from files and can be dropped at will.
    """

    error: str | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    peak_private_memory: int = 0
    network_layers: dict[str, int] | None = None
    engine_layers: list[str] | None = None
    warnings: list[str] | None = None


# What a library counts with.
Steps = Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)]


@dataclass(frozen=True)
class BuildEvent:
    """A phase of the build, the steps of it that are done, and all that there are; 0 where it counts none."""

    phase: str
    step: Steps
    steps: Steps


REQUESTS = JsonFormat("request for a build", 1 << 24, "build the plan again", kind=BuildRequest)
RESULTS = JsonFormat("result of a build", 1 << 28, "build the plan again", kind=BuildResult)
EVENTS = JsonFormat("event of a build", 1 << 16, "build the plan again", kind=BuildEvent)
TIMING_CACHES = Format("timing cache", 1 << 30, "delete it, or give another --timing-cache")


def main(path: str) -> int:
    """Build what the request at `path` says."""
    request = REQUESTS.read(Path(path))
    # The library writes to stdout here and there; events go where nothing else does.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    result = BuildResult(warnings=[])
    watch = _MemoryWatch()
    try:
        build(find_product(request.product), request, result, lambda **event: print(json.dumps(event), file=events))
    except (BuildError, InputError) as error:
        result.error = str(error)
    result.seconds = time.perf_counter() - started
    result.peak_memory, result.peak_private_memory = watch.stop()
    Path(request.result).write_text(json.dumps(asdict(result)), encoding="utf-8")
    return 0


class BuildError(Exception):
    """The library refused; the message says what it said."""


def build(product: Product, request: BuildRequest, result: BuildResult, emit: Any) -> None:
    """Parse, build, and write the plan. Raises `BuildError`."""
    trt = product.module
    log = _logger(trt)
    builder = trt.Builder(log)
    if request.kernels is not None:
        register(trt, Path(request.kernels).read_bytes())
    network = builder.create_network(product.network_flags())
    parser = trt.OnnxParser(network, log)
    emit(phase="reading the graph", step=0, steps=0)
    if not parser.parse_from_file(request.graph):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        told = "; ".join(f"{e.node_name()} ({e.node_operator()}): {_first_line(e.desc())}" for e in errors)
        raise BuildError(f"{product.name} cannot read the graph: {told or log.last_errors()}")
    kinds = Counter(str(network.get_layer(index).type).split(".")[-1] for index in range(network.num_layers))
    result.network_layers = dict(kinds)
    if kinds["PLUGIN_V3"] != request.plugin_layers:
        raise BuildError(
            f"{kinds['PLUGIN_V3']} attention layers became the plugin, and {request.plugin_layers} should have; "
            "the plugin is not registered as the graph names it"
        )
    config = builder.create_builder_config()
    # On by default, it would round what float32 multiplies to 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # TensorRT for RTX may otherwise allocate while it runs, and then cannot be captured as a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = monitor = _monitor(trt, emit)
    product.set_capabilities(config, request.capabilities)
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, ranges in shapes.items():
            profile.set_shape(name, *(tuple(shape) for shape in ranges))
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{product.name} refuses the limits: {log.last_errors()}")
    cache = _timing_cache(config, request.timing_cache)
    if not _write_plan(trt, builder, network, config, Path(request.plan)):
        raise BuildError(f"{product.name} cannot build the plan: {log.last_errors()}")
    del monitor
    result.engine_layers = log.engine_layers
    result.warnings = log.warnings
    if cache is not None and request.timing_cache:
        with atomic_path(Path(request.timing_cache)) as temporary:
            temporary.write_bytes(cache.serialize())


def _write_plan(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> bool:
    """Build the plan into `path`; return whether that worked."""

    class Writer(trt.IStreamWriter):
        """Passes the plan on as it is made, which saves a copy of it in memory."""

        def __init__(self, file: BinaryIO) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = file
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            # An exception would go through the library's own code, and not every version heeds what is returned.
            rest = memoryview(data)
            try:
                # A disk that is nearly full takes a part.
                while rest and self.error is None:
                    rest = rest[self.file.write(rest) :]
            except OSError as error:
                self.error = error
            return len(data) - len(rest)

    with path.open("wb", buffering=0) as file:
        writer = Writer(file)
        done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        path.unlink()
        raise BuildError(f"cannot write the plan: {writer.error.strerror}; free some space or choose another folder")
    return bool(done)


class _MemoryWatch:
    """Looks at how much memory the process has, and keeps the most. The kernel's own count begins with the parent's."""

    def __init__(self) -> None:
        self._most = (0, 0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.05):
            memory = process.memory_info()
            resident, private = self._most
            self._most = max(resident, memory.rss), max(private, memory.rss - memory.shared)

    def stop(self) -> tuple[int, int]:
        """Return the most bytes resident, and the most of those that are no file's."""
        self._done.set()
        self._thread.join()
        return self._most


def _timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    held = TIMING_CACHES.content(Path(path)) if Path(path).is_file() else b""
    cache = config.create_timing_cache(held)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        # A cache of another version or GPU is of no use: begin anew.
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        """Keeps errors, warnings, and the list of the engine's layers, which is logged when a build ends."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.engine_layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                if NO_GPU not in message:
                    self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            elif message.startswith(LAYERS_BEGIN):
                self.engine_layers = [line for line in message.splitlines() if "LayerType:" in line]

        def last_errors(self) -> str:
            return "; ".join(_first_line(error) for error in self.errors[-3:]) or "it gives no reason"

    return Log()


def _monitor(trt: Any, emit: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Tells how far each phase of a build is."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            emit(phase=phase, step=0, steps=steps)

        def step_complete(self, phase: str, step: int) -> bool:
            emit(phase=phase, step=step + 1, steps=self.steps[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            emit(phase=phase, step=self.steps[phase], steps=self.steps[phase])

    return Monitor()


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
