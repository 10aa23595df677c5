"""Tokens to the runs of their experts and back, by a permutation of copies: nothing is added by atomics.

A token's copies are summed in the order of its experts, so that equal inputs give equal bits. The order needs no answer
from the device: a token has as many copies as it has choices, whichever they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.choice import jit, tl, triton, triton_takes


@dataclass(frozen=True)
class Order:
    """Where the copies of tokens go: rows by expert, an expert's in the order of tokens."""

    row_of: Tensor
    """int32 [tokens, top_k]: rows of a token's copies, by expert."""
    token_of: Tensor
    """int32 [tokens * top_k]: whose copy a row is."""
    cell_of: Tensor
    """int64 [tokens * top_k]: a row's place in a flat [tokens, experts]."""
    counts: Tensor
    """int32 [experts]: how many rows each expert has."""


def order_by_expert(chosen: Tensor, top_k: int) -> Order:
    """Of bool [tokens, experts], true `top_k` times in each row."""
    if triton_takes("order by expert", None, chosen):
        return _order(chosen.contiguous(), top_k)
    expert, token = chosen.T.nonzero(as_tuple=True)
    order = token.argsort(stable=True)
    return Order(
        row_of=order.int().view(-1, top_k),
        token_of=token.int(),
        cell_of=token * chosen.shape[1] + expert,
        counts=chosen.sum(0, dtype=torch.int32),
    )


def permute(hidden: Tensor, order: Order) -> Tensor:
    """[tokens, hidden] -> a copy for each choice, by expert [tokens * top_k, hidden]."""
    rows: Tensor = _Permute.apply(hidden, order.token_of, order.row_of)
    return rows


def combine(rows: Tensor, order: Order) -> Tensor:
    """The inverse: [tokens * top_k, hidden] -> the sum of each token's copies [tokens, hidden], in fp32 at least."""
    hidden: Tensor = _Combine.apply(rows, order.token_of, order.row_of)
    return hidden


def permute_weights(weights: Tensor, order: Order) -> Tensor:
    """Of a router's [tokens, experts], each copy's own [tokens * top_k]."""
    return cells(weights, order.cell_of)


def cells(weights: Tensor, cell_of: Tensor) -> Tensor:
    """Elements of `weights` by their places in it flat, none of them twice."""
    found: Tensor = _PermuteWeights.apply(weights, cell_of)
    return found


def divide_rows(rows: Tensor, row_of: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """rows [n, hidden] in the order `row_of` (int32 [n], each row once), in parts of these sizes; one pass each way."""
    parts: tuple[Tensor, ...] = _DivideRows.apply(rows, row_of, tuple(sizes))
    return parts


def join_rows(parts: Sequence[Tensor], row_of: Tensor) -> Tensor:
    """The inverse of `divide_rows`: each part is written to where it belongs, none to the others first."""
    rows: Tensor = _JoinRows.apply(row_of, *parts)
    return rows


def sum_of_copies(rows: Tensor, row_of: Tensor) -> Tensor:
    """rows [copies, hidden], row_of [tokens, top_k] -> [tokens, hidden], each the sum of its rows in that order."""
    rows = rows.contiguous()
    reason = None if rows.element_size() <= 4 else "the kernel takes 16 and 32 bits"
    if not triton_takes("sum of copies", reason, rows):
        return plain_sum_of_copies(rows, row_of)
    tokens, top_k = row_of.shape
    width = rows.shape[1]
    out = rows.new_empty(tokens, width)
    if tokens:
        _sum_kernel[(tokens, triton.cdiv(width, _COLUMNS))](rows, row_of, out, width, TOP_K=top_k, COLUMNS=_COLUMNS)
    return out


def plain_sum_of_copies(rows: Tensor, row_of: Tensor) -> Tensor:
    """`sum_of_copies` in plain torch."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    return rows[row_of.long()].sum(1, dtype=precise).to(rows.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, token_of: Tensor, row_of: Tensor) -> Tensor:
        ctx.save_for_backward(token_of, row_of)
        return hidden.index_select(0, token_of)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        token_of, row_of = ctx.saved_tensors
        return _Combine.apply(grad, token_of, row_of), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of: Tensor, row_of: Tensor) -> Tensor:
        ctx.save_for_backward(token_of, row_of)
        return sum_of_copies(rows, row_of)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        token_of, row_of = ctx.saved_tensors
        return _Permute.apply(grad, token_of, row_of), None, None


class _DivideRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_of: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(row_of)
        return tuple(rows.index_select(0, part) for part in row_of.split(sizes))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (row_of,) = ctx.saved_tensors
        return _JoinRows.apply(row_of, *grads), None, None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row_of: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(row_of)
        ctx.sizes = tuple(map(len, parts))
        rows = parts[0].new_empty(len(row_of), parts[0].shape[1])
        for part, to in zip(parts, row_of.split(ctx.sizes), strict=True):
            _place(part.contiguous(), to, rows)
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (row_of,) = ctx.saved_tensors
        return None, *_DivideRows.apply(grad, row_of, ctx.sizes)


def _place(part: Tensor, to: Tensor, rows: Tensor) -> None:
    """Each of `part` is written to one of `rows`."""
    if not triton_takes("place rows", None if part.element_size() <= 4 else "the kernel takes 16 and 32 bits", part):
        rows[to.long()] = part
    elif len(part):
        width = part.shape[1]
        _place_kernel[(len(part), triton.cdiv(width, _COLUMNS))](part, to, rows, width, COLUMNS=_COLUMNS)


class _PermuteWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, cell_of: Tensor) -> Tensor:
        ctx.save_for_backward(cell_of)
        ctx.shape = weights.shape
        return weights.flatten().index_select(0, cell_of)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cell_of,) = ctx.saved_tensors
        spread = grad.new_zeros(ctx.shape)
        if triton_takes("spread of weights", None if grad.element_size() <= 4 else "the kernel takes 32 bits", grad):
            count = len(cell_of)
            # torch's deterministic scatter sorts; here no two rows have one cell.
            if count:
                _spread_kernel[(triton.cdiv(count, _COLUMNS),)](
                    grad.contiguous(), cell_of, spread, count, COLUMNS=_COLUMNS
                )
        else:
            spread.view(-1)[cell_of.long()] = grad
        return spread, None


_COLUMNS = 1024


_TOKENS = 128


def _order(chosen: Tensor, top_k: int) -> Order:
    """Counts by blocks of tokens, then places each token after those of the blocks and tokens before."""
    tokens, experts = chosen.shape
    blocks = triton.cdiv(tokens, _TOKENS)
    integers = {"dtype": torch.int32, "device": chosen.device}
    counted = torch.zeros(max(1, blocks), experts, **integers)
    sizes = {"TOKENS": _TOKENS, "PADDED": max(2, triton.next_power_of_2(experts)), "num_warps": 8}
    if blocks:
        _count_kernel[(blocks,)](chosen, counted, tokens, experts, **sizes)
    through = counted.cumsum(0, dtype=torch.int32)
    counts = through[-1]
    order = Order(
        row_of=torch.empty(tokens, top_k, **integers),
        token_of=torch.empty(tokens * top_k, **integers),
        cell_of=torch.empty(tokens * top_k, dtype=torch.int64, device=chosen.device),
        counts=counts,
    )
    if blocks:
        begins = counts.cumsum(0, dtype=torch.int32) - counts
        _order_kernel[(blocks,)](
            *(chosen, counted, through, begins, order.row_of, order.token_of, order.cell_of),
            *(tokens, experts, top_k),
            **sizes,
        )
    return order


@jit
def _block(chosen, tokens, experts, TOKENS: tl.constexpr, PADDED: tl.constexpr):
    """Tokens, experts, and which are chosen (0 or 1 [TOKENS, PADDED]) in a program's block."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, PADDED)
    inside = (token < tokens)[:, None] & (expert < experts)[None, :]
    mine = tl.load(chosen + token[:, None] * experts + expert[None, :], mask=inside, other=0)
    return token, expert, mine.to(tl.int32)


@jit
def _count_kernel(chosen, counted, tokens, experts, TOKENS: tl.constexpr, PADDED: tl.constexpr):
    _, expert, mine = _block(chosen, tokens, experts, TOKENS, PADDED)
    tl.store(counted + tl.program_id(0) * experts + expert, tl.sum(mine, 0), mask=expert < experts)


@jit
def _order_kernel(
    chosen,
    counted,
    through,
    begins,
    row_of,
    token_of,
    cell_of,
    tokens,
    experts,
    top_k,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
):
    token, expert, mine = _block(chosen, tokens, experts, TOKENS, PADDED)
    place = tl.program_id(0) * experts + expert
    known = expert < experts
    before = tl.load(through + place, mask=known, other=0) - tl.load(counted + place, mask=known, other=0)
    before += tl.load(begins + expert, mask=known, other=0)
    row = before[None, :] + tl.cumsum(mine, 0) - 1
    slot = tl.cumsum(mine, 1) - 1
    is_mine = mine > 0
    tl.store(row_of + token[:, None] * top_k + slot, row, mask=is_mine)
    tl.store(token_of + row, token[:, None] + tl.zeros_like(row), mask=is_mine)
    cell = token[:, None] * experts + expert[None, :]
    tl.store(cell_of + row, cell.to(tl.int64), mask=is_mine)


@jit(do_not_specialize=["count"])
def _spread_kernel(grad, cell_of, spread, count, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < count
    cell = tl.load(cell_of + row, mask=inside, other=0)
    tl.store(spread + cell, tl.load(grad + row, mask=inside, other=0.0), mask=inside)


@jit(do_not_specialize_on_alignment=["to"])
def _place_kernel(part, to, rows, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    there = tl.load(to + row).to(tl.int64)
    tl.store(rows + there * width + column, tl.load(part + row * width + column, mask=inside), mask=inside)


@jit
def _sum_kernel(rows, row_of, out, width, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(row_of + token * TOP_K + choice).to(tl.int64)
        total += tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)
