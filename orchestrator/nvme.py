"""Whether this machine's DeepSpeed can keep tensors on NVMe: looked at from outside, without importing it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from jobs.errors import InputError
from jobs.spec import LayoutSpec

_OPERATIONS = {"async_io": "ops/aio/async_io_op", "pin_memory": "ops/pin_memory/pin_memory_op"}


def check_nvme(layout: LayoutSpec) -> None:
    """InputError where a layout keeps tensors on NVMe and DeepSpeed's operations for it are not built.

    DeepSpeed would compile them in a rank, for minutes, and a rank that is killed meanwhile leaves a lock behind for
    which every later one waits for ever.
    """
    for field in ("offload_optimizer", "offload_parameters"):
        if getattr(layout, field) == "nvme" and (missing := _not_built()):
            rule = (
                f"{' and '.join(missing)} of DeepSpeed are not built here: with a C++ compiler and libaio's headers, "
                "reinstall deepspeed with DS_BUILD_AIO=1 DS_BUILD_PIN_MEMORY=1 LDFLAGS='-Wl,--no-as-needed -laio'"
            )
            raise InputError(f"layout.{field}", "nvme", rule, "cpu")
    if layout.nvme_folder is not None and not Path(layout.nvme_folder).is_dir():
        raise InputError("layout.nvme_folder", layout.nvme_folder, "is no folder on this machine")


def _not_built() -> list[str]:
    spec = importlib.util.find_spec("deepspeed")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return [
        name
        for name, library in _OPERATIONS.items()
        if not any(any(Path(place).glob(f"{library}*.so")) for place in places)
    ]
