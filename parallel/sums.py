"""All-reduces that autograd sees through: what tensor and sequence parallelism add to a model for one device.

A value that every rank of a group holds alike ("replicated") has the same, whole gradient on each of them: that is the
convention on both sides of these functions (Shoeybi et al. 2019, their f and g).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_gradients(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A replicated value enters work that ranks divide: each finds a part of its gradient.

    Forward: nothing, x itself. Backward: an all-reduce of x's elements.
    """
    out: Tensor = _SumGradients.apply(x, group)
    return out


def sum_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Ranks' parts become the replicated sum that they go on with alike.

    Forward: an all-reduce of x's elements. Backward: nothing, the gradient itself.
    """
    out: Tensor = _SumParts.apply(x, group)
    return out


def sum_everywhere(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ranks' parts, of which each rank then makes something of its own: losses that are to be added up.

    Forward: an all-reduce of x's elements. Backward: the same of their gradients.
    """
    return sum_gradients(sum_parts(x, group), group)


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradient, ctx.group), None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of a copy that is contiguous, whatever x is: the library reduces the memory that it is given."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out
