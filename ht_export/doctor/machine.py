"""The machine: its processor, memory, disk and GPUs, as far as the system tells."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from runtime.checks import cores
from runtime.errors import one_line
from runtime.memory import container_bytes

CPU_FILE = Path("/proc/cpuinfo")
MEMORY_FILE = Path("/proc/meminfo")
# Seconds that a tool of a driver has.
PATIENCE = 20.0
# What speeds products of matrices up, and the flags that tell of it, by any of which it is there.
FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "bf16"),
    "AMX": ("amx_tile",),
    "NEON": ("asimd",),
    "dot product": ("asimddp",),
    "i8mm": ("i8mm",),
    "SVE": ("sve",),
}
ON_X86 = ("AVX2", "AVX-512", "VNNI", "bf16", "AMX")
ON_ARM = ("NEON", "dot product", "i8mm", "bf16", "SVE")
X86 = ("x86_64", "amd64", "i686", "i386")
ARM = ("aarch64", "arm64")
GPU_FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "memory.free")


@dataclass(frozen=True)
class Machine:
    """A machine: `features` says which of a processor's matter and are there, None where nothing tells. Bytes are None
    where nothing tells of them.
    """

    system: str
    python: str
    cpu: str
    cores: int
    features: dict[str, bool] | None
    memory_bytes: int | None
    available_bytes: int | None
    container_bytes: int | None
    disk_free_bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, as the driver's tool tells of it, all as text."""

    name: str
    driver: str
    compute_capability: str
    memory: str
    free: str


def look(folder: Path) -> Machine:
    """Return what this machine is; the disk is that of `folder`."""
    lines = _lines(CPU_FILE)
    memory = {line.partition(":")[0]: line.partition(":")[2].split() for line in _lines(MEMORY_FILE)}
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        cpu=_field(lines, "model name") or platform.processor() or platform.machine() or "unknown",
        cores=cores(),
        features=_features(lines),
        memory_bytes=_kibibytes(memory.get("MemTotal")) or _by_sysconf(),
        available_bytes=_kibibytes(memory.get("MemAvailable")),
        container_bytes=container_bytes(),
        disk_free_bytes=_free(folder),
    )


def gpus() -> tuple[list[Gpu], str | None]:
    """Return the NVIDIA GPUs, and why none can be told of, where so: no driver, or one that does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=PATIENCE)
    except FileNotFoundError:
        return [], "no NVIDIA driver: there is no nvidia-smi"
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {PATIENCE:g} s"
    except OSError as error:
        return [], f"nvidia-smi cannot be run ({error.strerror or error})"
    if done.returncode:
        return [], f"nvidia-smi failed: {one_line(done.stdout.strip() or done.stderr)}"
    rows = [[one_line(part) for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    found = [Gpu(*(part.strip() for part in row)) for row in rows if len(row) == len(GPU_FIELDS)]
    return found, None if found else "nvidia-smi tells of no GPU"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        # Not Linux.
        return []


def _field(lines: list[str], name: str) -> str:
    return next((one_line(line.partition(":")[2]) for line in lines if line.partition(":")[0].strip() == name), "")


def _features(lines: list[str]) -> dict[str, bool] | None:
    flags = {*_field_words(lines, "flags"), *_field_words(lines, "Features")}
    machine = platform.machine().lower()
    names = ON_X86 if machine in X86 else ON_ARM if machine in ARM else ()
    return {name: not flags.isdisjoint(FEATURES[name]) for name in names} if flags and names else None


def _field_words(lines: list[str], name: str) -> list[str]:
    # Longer than a line that is shown.
    return next((line.partition(":")[2].split() for line in lines if line.partition(":")[0].strip() == name), [])


def _kibibytes(words: list[str] | None) -> int | None:
    return int(words[0]) << 10 if words and words[0].isdigit() else None


def _by_sysconf() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
