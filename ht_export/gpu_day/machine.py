"""What a day's results say of the machine."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from ht_export.bench.gpu.environment import environment


def describe(arguments: list[str], kit: dict[str, Any] | None) -> dict[str, Any]:
    """Return the device, driver, versions and commit, and the command; `kit` is what was packed, which knows the commit
    where this is no clone.
    """
    found = environment(arguments)
    found["command"] = " ".join(["python scripts/gpu_day.py", *arguments])
    found["commit"] = found["commit"] or (kit or {}).get("commit")
    found["kit"] = None if kit is None else {name: kit.get(name) for name in ("date", "commit")}
    found["began"] = time.time()
    found["cores"] = os.cpu_count()
    found["system"] = platform.platform()
    found["executable"] = Path(sys.executable).name
    return found


def on_gpu() -> dict[str, Any]:
    """Return what torch says of the GPU; nothing where it sees none. It costs the making of a context."""
    import torch

    if not torch.cuda.is_available():
        return {"torch": torch.__version__, "cuda": torch.version.cuda, "available": False}
    properties = torch.cuda.get_device_properties(0)
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "available": True,
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
    }
