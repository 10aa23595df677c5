"""Equal bits from equal runs: what torch is asked for, where a job wants it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allow() -> None:
    """Let products on a GPU be deterministic later; before CUDA is used. It costs nothing by itself."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def enforce() -> None:
    """Take no kernel that sums in any order; an operation that has no other is refused by torch. After `allow`.

    This project's kernels sum in one order anyway; `kernels.attention` changes its backward.
    """
    # It would fill every new tensor, to make reading what nobody wrote repeatable.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)


@contextmanager
def enforced() -> Iterator[None]:
    """`enforce`, and back."""
    enforce()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
