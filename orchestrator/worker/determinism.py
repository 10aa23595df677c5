"""Equal bits from equal runs: what torch is asked for, where a job wants it."""

from __future__ import annotations

import os

import torch


def enforce() -> None:
    """Take no kernel that sums in any order; an operation that has no other is refused by torch. Before CUDA is used.

    This project's kernels sum in one order anyway; `kernels.attention` changes its backward.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would fill every new tensor, to make reading what nobody wrote repeatable.
    torch.utils.deterministic.fill_uninitialized_memory = False
