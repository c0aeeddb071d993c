"""The memory of this machine, or of the container that this process is in."""

from __future__ import annotations

from pathlib import Path

# Of the memory that is free, the share that caches may take.
SHARE = 4
# Where nothing can be found out.
UNKNOWN = 4 << 30


def available_bytes() -> int:
    """Return how many bytes may still be used, as far as the system tells: by its memory, and by a container's."""
    found = [value for value in (_of_machine(), container_bytes()) if value is not None]
    return min(found, default=UNKNOWN)


def default_cache_bytes(least: int) -> int:
    """Return the bytes for keys and values where nobody says: a share of what is free, and at least `least`."""
    return max(least, available_bytes() // SHARE)


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def container_bytes() -> int | None:
    """Return how many bytes the container that this process is in may still use; None where it has no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        # As the kernel documents for cgroup v2. The limit is "max" where there is none.
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        return max(0, limit - int((folder / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return None
