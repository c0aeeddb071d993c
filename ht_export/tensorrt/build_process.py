"""Building a plan: what it needs is checked beforehand, and the build runs in a process that may die without us."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import psutil

from ht_export.tensorrt.limits import Profile
from ht_export.tensorrt.products import Capability, Product
from ht_export.tensorrt.worker import EVENTS, RESULTS, BuildRequest, BuildResult
from runtime.errors import InputError

ATTENTIONS = ("auto", "plugin", "native")
# Memory needed per byte of weights: builds of 0.27 and 2.5 GB took less (docs/tensorrt.md). The library itself takes
# the constant.
MEMORY_FACTOR = 2.0
MEMORY_CONSTANT = 1 << 30
# Disk space needed per byte of weights, for the exported graph and the plan together.
DISK_FACTOR = 2.6

LINKS = "libraries"

# Told the library's phase, and the steps of it that are done and all that there are; 0 where it counts none.
OnPhase = Callable[[str, int, int], None]


def check_resources(weight_bytes: int, folder: Path) -> None:
    """Raise `InputError` unless a plan of so many bytes of weights can be built, with its file in `folder`."""
    memory = int(MEMORY_FACTOR * weight_bytes) + MEMORY_CONSTANT
    free = psutil.virtual_memory().available
    if free < memory:
        raise InputError(
            f"building the plan takes about {memory >> 20} MiB of memory, and {free >> 20} MiB are free; close other "
            "programs, or build on a larger machine"
        )
    disk = int(DISK_FACTOR * weight_bytes)
    free = shutil.disk_usage(folder).free
    if free < disk:
        raise InputError(
            f"{folder} has {free >> 20} MiB free, and building the plan takes about {disk >> 20} MiB there; free some "
            "space or choose another folder"
        )


def build_plan(
    product: Product,
    graph: Path,
    plan: Path,
    profiles: Sequence[Profile],
    capabilities: Sequence[Capability],
    *,
    kernels: bytes | None = None,
    plugin_layers: int = 0,
    timing_cache: Path | None = None,
    on_phase: OnPhase = lambda *_: None,
) -> BuildResult:
    """Build `plan` from `graph` in a process of its own. Raises `InputError` with what the library said."""
    folder = plan.parent
    request_path, result_path = folder / "request.json", folder / "result.json"
    kernels_path = None
    if kernels is not None:
        kernels_path = folder / "kernels.bin"
        kernels_path.write_bytes(kernels)
    request = BuildRequest(
        product=product.name,
        graph=str(graph),
        plan=str(plan),
        result=str(result_path),
        capabilities=list(capabilities),
        profiles=[profile.shapes for profile in profiles],
        kernels=None if kernels_path is None else str(kernels_path),
        plugin_layers=plugin_layers,
        timing_cache=None if timing_cache is None else str(timing_cache),
    )
    request_path.write_text(json.dumps(asdict(request)), encoding="utf-8")
    try:
        return _run(product, request_path, result_path, folder, on_phase)
    finally:
        for path in (request_path, result_path, kernels_path):
            if path is not None:
                path.unlink(missing_ok=True)
        shutil.rmtree(folder / LINKS, ignore_errors=True)


def _run(product: Product, request: Path, result: Path, folder: Path, on_phase: OnPhase) -> BuildResult:
    said = folder / "build.log"
    with said.open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ht_export.tensorrt.worker", str(request)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(product, folder),
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                # Of a worker that dies the last line may be cut.
                if line.endswith("\n"):
                    event = EVENTS.decode(line, "what the build told")
                    on_phase(event.phase, event.step, event.steps)
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        log.seek(0)
        tail = " ".join(log.read().split())[-500:]
    said.unlink()
    found = _read(result)
    if found is None:
        raise InputError(
            f"{product.name} {product.version} ended the build: {_cause(status)}{f' ({tail})' if tail else ''}; "
            "try --attention native, another --precision or another version"
        )
    if found.error:
        # An error that a plugin raises reaches stderr only.
        raise InputError(f"{found.error}{f' ({tail})' if tail else ''}")
    return found


def _read(result: Path) -> BuildResult | None:
    """Return what the worker wrote, or None when it did not get to, or there was no room."""
    try:
        return RESULTS.read(result)
    except InputError:
        return None


def _environment(product: Product, folder: Path) -> dict[str, str]:
    """Return the worker's environment. The wheel of TensorRT for RTX ships its library as `libtensorrt_rtx.so.1` only,
    and its plugin code loads `libtensorrt_rtx.so`, or aborts the process.
    """
    environment = dict(os.environ)
    spec = find_spec("tensorrt_rtx_libs") if product.name == "tensorrt-rtx" else None
    for location in (spec.submodule_search_locations or []) if spec else []:
        for library in Path(location).glob("libtensorrt_rtx.so.*"):
            links = folder / LINKS
            links.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                (links / "libtensorrt_rtx.so").symlink_to(library)
            before = environment.get("LD_LIBRARY_PATH")
            environment["LD_LIBRARY_PATH"] = f"{links}:{before}" if before else str(links)
    return environment


def _cause(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"it was killed with {name}" + (", likely for want of memory" if name == "SIGKILL" else "")
    return f"it ended with status {status} and no result"
