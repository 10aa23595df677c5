"""What Triton wants of a machine beside a GPU; no torch."""

from __future__ import annotations

import os
import shutil


def c_compiler() -> str | None:
    """By which Triton compiles what starts its kernels, where they run; None where it would find none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
