"""Which way an operation goes: Triton's where it runs and takes the tensors, else plain torch, told once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from kernels.compiler import c_compiler

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # torch's CPU builds come without
    triton = tl = TensorDescriptor = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on the CPU, an element at a time: for tests."""

_told: set[tuple[str, ...]] = set()


def jit(kernel: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton and nobody will call it.

    Triton compiles a kernel once more for whole numbers that are 1 or multiples of 16, and for addresses that are. Of
    arguments that routing decides, and so another in every step, name those as `do_not_specialize` (numbers) and
    `do_not_specialize_on_alignment` (addresses): else ranks wait for a compiler in the middle of a run.
    """
    if kernel is None:
        return partial(jit, **options)
    return kernel if triton is None else triton.jit(kernel, **options)


@cache
def _compiles() -> bool:
    found = triton is not None and c_compiler() is not None
    if not found:
        missing = "Triton" if triton is None else "a C compiler"
        warnings.warn(
            f"no kernels without {missing}: all goes by plain torch; `fivefold doctor` tells more", stacklevel=4
        )
    return found


def triton_runs(tensor: Tensor) -> bool:
    """Whether Triton has a target for tensors that lie where this one does. Warns once where a GPU goes without it."""
    return INTERPRETED if tensor.device.type == "cpu" else tensor.is_cuda and _compiles()


def triton_takes(operation: str, reason: str | None, *tensors: Tensor) -> bool:
    """Whether to take Triton's way; `reason`, if any, says why its kernel does not take these tensors.

    Where it would run but does not take them, warns once for each operation, reason and shapes.
    """
    if not triton_runs(tensors[0]):
        return False
    if reason is None:
        return True
    shapes = ", ".join(f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype)[6:]}" for tensor in tensors)
    if (operation, reason, shapes) not in _told:
        _told.add((operation, reason, shapes))
        warnings.warn(f"{operation} of {shapes} goes by plain torch: {reason}", stacklevel=3)
    return False


def programs(tensor: Tensor) -> int:
    """How many programs fill the device when each goes on to further tiles."""
    if INTERPRETED:
        return 3
    return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)
