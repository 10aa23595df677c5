"""Root-mean-square norm (Zhang and Sennrich 2019) of a residual stream with what is added to it just before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.choice import jit, programs, tl, triton, triton_takes


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, [..., width]; inside, fp32 at least."""
    _, normed = _AddRMSNorm.apply(x, None, weight, epsilon)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + residual, both [..., width], and its norm, in one pass.

    Kept for backward: the sum, which goes on as the residual, and fp32 a row. The gradients of both results meet in one
    pass too; that of the weight is summed in one order.
    """
    total, normed = _AddRMSNorm.apply(x, residual, weight, epsilon)
    return total, normed


def plain_add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch, differentiable any number of times."""
    total = x if residual is None else x + residual
    return total, functional.rms_norm(total, weight.shape, weight, epsilon)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        ctx.adds, ctx.epsilon = residual is not None, epsilon
        if not triton_takes("RMS norm", _reason(x), x):
            total, normed = plain_add_rms_norm(x, residual, weight, epsilon)
            ctx.save_for_backward(total, weight, None)
        else:
            x = x.contiguous()
            rows, width = x.numel() // x.shape[-1], x.shape[-1]
            total, normed = torch.empty_like(x) if ctx.adds else x, torch.empty_like(x)
            inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
            if rows:
                sizes = _sizes(width)
                _forward_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
                    *(x, residual.contiguous() if ctx.adds else None, weight, total, normed, inverse),
                    *(rows, width, epsilon),
                    ADDS=ctx.adds,
                    **sizes,
                )
            ctx.save_for_backward(total, weight, inverse)
        if not ctx.adds:
            ctx.mark_non_differentiable(total := total.new_empty(0))
        return total, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_total: Tensor, of_normed: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, inverse = ctx.saved_tensors
        of_total = of_total if ctx.adds else None
        if inverse is None:
            of_x, of_weight = plain_gradients(of_normed, total, weight, ctx.epsilon)
            of_x = of_x if of_total is None else of_x + of_total
        else:
            of_x, of_weight = _gradients(of_total, of_normed, total, weight, inverse)
        return of_x, of_x if ctx.adds else None, of_weight, None


def plain_gradients(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Of x and of the weight, in plain torch: grad and x [..., width]."""
    precise = torch.promote_types(x.dtype, torch.float32)
    wide, upon = x.to(precise), grad.to(precise)
    inverse = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    unit, weighted = wide * inverse, upon * weight
    of_x = inverse * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    return of_x.to(x.dtype), (upon * unit).flatten(0, -2).sum(0).to(weight.dtype)


def _gradients(
    of_total: Tensor | None, of_normed: Tensor, total: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    rows, width = len(inverse), total.shape[-1]
    of_x = torch.empty_like(total)
    workers = max(1, min(programs(total) * 2, rows))
    parts = torch.empty(workers, width, dtype=torch.float32, device=total.device)
    _backward_kernel[(workers,)](
        *(None if of_total is None else of_total.contiguous(), of_normed.contiguous(), total, weight, inverse),
        *(of_x, parts, rows, width, triton.cdiv(rows, workers)),
        ADDS=of_total is not None,
        **_sizes(width),
    )
    return of_x, parts.sum(0).to(weight.dtype)


_WIDEST = 16_384
_ELEMENTS = 4096
"""Of a tile, where a row has fewer."""


def _reason(x: Tensor) -> str | None:
    if x.shape[-1] > _WIDEST:
        return f"the kernel takes rows of up to {_WIDEST} elements"
    return None if x.element_size() <= 4 else "the kernel takes 16 and 32 bits"


def _sizes(width: int) -> dict[str, int]:
    columns = int(triton.next_power_of_2(width))
    return {"ROWS": max(1, _ELEMENTS // columns), "COLUMNS": columns, "num_warps": 16 if columns > 8192 else 8}


@jit
def _forward_kernel(
    x,
    residual,
    weight,
    total,
    normed,
    inverse,
    rows,
    width,
    epsilon,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * width + column[None, :]
    inside = (row < rows)[:, None] & (column < width)[None, :]
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        # Rounded as it is stored: the norm is of what goes on.
        wide = (wide + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, wide, mask=inside)
        wide = wide.to(tl.float32)
    over = 1 / tl.sqrt(tl.sum(wide * wide, 1) / width + epsilon)
    tl.store(inverse + row, over, mask=row < rows)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    result = wide * over[:, None] * scale[None, :]
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    of_total,
    of_normed,
    total,
    weight,
    inverse,
    of_x,
    parts,
    rows,
    width,
    share,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program a run of `share` rows, whose part of the weight's gradient it sums by itself."""
    begin = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    column = tl.arange(0, COLUMNS)
    known = column < width
    scale = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    of_weight = tl.zeros((COLUMNS,), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None] * width + column[None, :]
        inside = (row < end)[:, None] & known[None, :]
        wide = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        upon = tl.load(of_normed + at, mask=inside, other=0.0).to(tl.float32)
        over = tl.load(inverse + row, mask=row < end, other=0.0)[:, None]
        unit, weighted = wide * over, upon * scale[None, :]
        result = over * (weighted - unit * (tl.sum(weighted * unit, 1) / width)[:, None])
        if ADDS:
            result += tl.load(of_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_x + at, result.to(of_x.dtype.element_ty), mask=inside)
        of_weight += tl.sum(upon * unit, 0)
    tl.store(parts + tl.program_id(0) * width + column, of_weight, mask=known)
