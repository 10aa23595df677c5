"""What a machine says of itself. Run on one rank, for a GPU's memory is asked of a process that holds a context."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from orchestrator.worker.host_memory import available_bytes

_DRIVERS = (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version"))


def facts(rank: int, kind: str) -> dict[str, Any]:
    """Facts of a device, and the memory that is free on it or, of a CPU, on the machine."""
    found: dict[str, Any] = {"torch": torch.__version__}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(rank)
        free, _ = torch.cuda.mem_get_info(rank)
        return found | {
            "device": properties.name,
            "driver": _driver(),
            "memory_bytes": properties.total_memory,
            "processors": properties.multi_processor_count,
            "free_bytes": free,
        }
    return found | {"device": _processor(), "driver": "", "free_bytes": available_bytes()}


def _driver() -> str:
    told = [path.read_text(encoding="utf-8") for path in _DRIVERS if path.exists()]
    found = re.search(r"\b\d{3,}\.[\d.]+", " ".join(told))
    return found[0] if found else "unknown"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
