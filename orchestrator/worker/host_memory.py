"""What a machine's memory still holds."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int:
    """Of this machine, or of the container that this is, where that has less."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    available = int(line.split()[1]) * 1024
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:  # no container, or an older kernel's
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))
