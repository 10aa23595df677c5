"""Triton's kernels are interpreted here, on the CPU; that is decided when they are first imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from kernels import choice

assert choice.INTERPRETED, "run tests/kernels alone, where Triton is installed: kernels were imported before"
