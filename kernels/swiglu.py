"""SwiGLU (Shazeer 2020) of a gate and a value that lie side by side, silu(gate) * up, times a weight for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.choice import jit, tl, triton, triton_takes


def swiglu(wide: Tensor) -> Tensor:
    """wide [..., 2 * width], gate first -> [..., width], differentiable; keeps what it is given alone."""
    out: Tensor = _SwiGLU.apply(wide)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wide: Tensor) -> Tensor:
        ctx.save_for_backward(wide)
        return weighted_swiglu(wide.flatten(0, -2), None).unflatten(0, wide.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (wide,) = ctx.saved_tensors
        of_wide, _, _ = weighted_swiglu_backward(grad.flatten(0, -2), wide.flatten(0, -2), None, again=False)
        return of_wide.view_as(wide)


def weighted_swiglu(wide: Tensor, weights: Tensor | None) -> Tensor:
    """wide [n, 2 * width], gate first, and weights [n] -> [n, width], in the precision of `wide`; inside, fp32."""
    wide = wide.contiguous()
    if not triton_takes("weighted SwiGLU", _reason(wide), wide):
        return plain_weighted_swiglu(wide, weights)
    rows, width = len(wide), wide.shape[1] // 2
    out = wide.new_empty(rows, width)
    if out.numel():
        _forward_kernel[(rows, triton.cdiv(width, _COLUMNS))](
            wide, _flat(weights), out, width, WEIGHTED=weights is not None, COLUMNS=_COLUMNS
        )
    return out


def weighted_swiglu_backward(
    grad: Tensor, wide: Tensor, weights: Tensor | None, *, again: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad [n, width] of the result -> gradients of `wide` and of `weights` (fp32 at least), and the result `again`.

    In one pass over `grad` and `wide`: what the next linear's weight gradient needs is not kept, it is made here.
    """
    grad, wide = grad.contiguous(), wide.contiguous()
    if not triton_takes("weighted SwiGLU's gradient", _reason(wide), wide):
        return plain_weighted_swiglu_backward(grad, wide, weights)
    of_wide, out = torch.empty_like(wide), torch.empty_like(grad) if again else None
    of_weights = None if weights is None else torch.empty(len(wide), dtype=torch.float32, device=wide.device)
    if len(wide):
        _backward_kernel[(len(wide),)](
            *(grad, wide, _flat(weights), of_wide, of_weights, out, grad.shape[1]),
            WEIGHTED=weights is not None,
            AGAIN=again,
            COLUMNS=_COLUMNS,
        )
    return of_wide, of_weights, out


def plain_weighted_swiglu(wide: Tensor, weights: Tensor | None) -> Tensor:
    """`weighted_swiglu` in plain torch."""
    gate, up = _precise(wide).chunk(2, -1)
    made = torch.nn.functional.silu(gate) * up
    return (made if weights is None else made * weights[:, None]).to(wide.dtype)


def plain_weighted_swiglu_backward(
    grad: Tensor, wide: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`weighted_swiglu_backward` in plain torch."""
    gate, up = _precise(wide).chunk(2, -1)
    precise = _precise(grad)
    weight = 1.0 if weights is None else weights[:, None]
    share = gate.sigmoid()
    silu = gate * share
    weighted = precise * weight
    of_gate = weighted * up * share * (1 + gate * (1 - share))
    of_weights = None if weights is None else (precise * silu * up).sum(-1)
    of_wide = torch.cat((of_gate, weighted * silu), -1).to(wide.dtype)
    return of_wide, of_weights, (silu * up * weight).to(wide.dtype)


def _flat(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.contiguous()


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


_COLUMNS = 1024


def _reason(wide: Tensor) -> str | None:
    return None if wide.element_size() <= 4 else "the kernel takes 16 and 32 bits"


@jit(do_not_specialize_on_alignment=["weights"])
def _forward_kernel(wide, weights, out, width, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gate = tl.load(wide + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(wide + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        result *= tl.load(weights + row).to(tl.float32)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@jit(do_not_specialize_on_alignment=["weights"])
def _backward_kernel(
    grad,
    wide,
    weights,
    of_wide,
    of_weights,
    out,
    width,
    WEIGHTED: tl.constexpr,
    AGAIN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program a row, whose weight's gradient is summed in the order of its columns: no atomics, always the same."""
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        gradient = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(wide + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(wide + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        weighted = gradient * weight
        if WEIGHTED:
            total += gradient * silu * up
        of_gate = weighted * up * share * (1 + gate * (1 - share))
        tl.store(of_wide + row * 2 * width + column, of_gate.to(of_wide.dtype.element_ty), mask=inside)
        of_up = weighted * silu
        tl.store(of_wide + (row * 2 + 1) * width + column, of_up.to(of_wide.dtype.element_ty), mask=inside)
        if AGAIN:
            tl.store(out + row * width + column, (silu * up * weight).to(out.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(of_weights + row, tl.sum(total))
