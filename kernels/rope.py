"""Rotary position embedding (Su et al. 2021) of a query's or key's heads, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.choice import jit, tl, triton, triton_takes


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Turns each head's pairs (i, i + head_dim / 2) by the angle of i, computed in fp32 at least.

    heads [sequence, batch, heads, head_dim]; angles [sequence, batch or 1, 1, head_dim], whose halves are alike. Gives
    a new tensor in the precision of `heads`. Keeps angles alone for backward, which is a turn the other way.
    """
    turned: Tensor = _Rotate.apply(heads, angles, False)
    return turned


def plain_rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """`rotate` in plain torch."""
    precise = heads.to(torch.promote_types(heads.dtype, torch.float32))
    first, second = precise.chunk(2, -1)
    turned = precise * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    return turned.to(heads.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, angles: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.back = back
        if not triton_takes("rotary embedding", _reason(heads), heads):
            return plain_rotate(heads, -angles if back else angles)
        sequence, batch, count, width = heads.shape
        turned = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
        if turned.numel():
            _kernel[(sequence * batch,)](
                heads,
                angles,
                turned,
                batch,
                count,
                *heads.stride()[:3],
                angles.stride(0),
                angles.stride(1) if angles.shape[1] > 1 else 0,
                BACK=back,
                HEADS=min(16, triton.next_power_of_2(count)),
                HALF=width // 2,
            )
        return turned

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        return _Rotate.apply(grad, angles, not ctx.back), None, None


def _reason(heads: Tensor) -> str | None:
    half = heads.shape[-1] // 2
    if heads.element_size() > 4:
        return "the kernel takes 16 and 32 bits"
    if half < 2 or half & (half - 1):
        return "half a head is no power of 2"
    return None if heads.stride(-1) == 1 else "heads do not lie together"


@jit
def _kernel(
    heads,
    angles,
    turned,
    batch,
    count,
    by_place,
    by_row,
    by_head,
    angles_by_place,
    angles_by_row,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """A program a token, whose angles serve all its heads."""
    token = tl.program_id(0)
    place, row = token // batch, token % batch
    column = tl.arange(0, HALF)
    angle = tl.load(angles + place * angles_by_place + row * angles_by_row + column).to(tl.float32)
    cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    if BACK:
        sine = -sine
    start = heads + place.to(tl.int64) * by_place + row.to(tl.int64) * by_row
    into = turned + token.to(tl.int64) * count * 2 * HALF
    for first in range(0, count, HEADS):
        head = first + tl.arange(0, HEADS)
        inside = (head < count)[:, None]
        source = start + head[:, None] * by_head + column[None, :]
        low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        target = into + head[:, None] * 2 * HALF + column[None, :]
        tl.store(target, (low * cosine - high * sine).to(turned.dtype.element_ty), mask=inside)
        tl.store(target + HALF, (high * cosine + low * sine).to(turned.dtype.element_ty), mask=inside)
