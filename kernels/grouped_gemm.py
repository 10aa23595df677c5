"""Matrix products of runs of rows with a weight for each run: an expert's tokens with that expert's weight.

Rows lie by expert; `ends` (int32, [experts]) says where each expert's run ends, the first begins at 0. Rows beyond the
last end belong to nobody: they are never read into a result, whatever they hold, and their results are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.choice import INTERPRETED, TensorDescriptor, jit, programs, tl, triton, triton_takes


def linear(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """rows [n, inner] of expert e times weights[e].T: weights [experts, outer, inner] -> [n, outer]."""
    if triton_takes("grouped linear", _reason(rows, weights), rows, weights):
        return _by_rows(rows, weights, ends, inner_first=False)
    return plain_linear(rows, weights, ends)


def input_gradient(grad: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """grad [n, outer] of `linear`'s result -> [n, inner], the gradient of its rows."""
    if triton_takes("grouped input gradient", _reason(grad, weights), grad, weights):
        return _by_rows(grad, weights, ends, inner_first=True)
    return plain_linear(grad, weights.mT, ends)


def weight_gradient(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """grad [n, outer] and rows [n, inner] -> [experts, outer, inner]; 0 for an expert without rows."""
    if triton_takes("grouped weight gradient", _reason(grad, rows), grad, rows):
        return _by_experts(grad, rows, ends)
    return plain_weight_gradient(grad, rows, ends)


def plain_linear(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`linear` in plain torch, an expert after another; waits for `ends`."""
    result = rows.new_zeros(len(rows), weights.shape[1])
    for index, run in enumerate(_runs(ends)):
        torch.mm(rows[run], weights[index].T, out=result[run])
    return result


def plain_weight_gradient(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """`weight_gradient` in plain torch, an expert after another; waits for `ends`."""
    result = rows.new_zeros(len(ends), grad.shape[1], rows.shape[1])
    for index, run in enumerate(_runs(ends)):
        torch.mm(grad[run].T, rows[run], out=result[index])
    return result


def _runs(ends: Tensor) -> list[slice]:
    last = ends.tolist()
    return [slice(begin, end) for begin, end in zip([0, *last], last, strict=False)]


def _reason(*tensors: Tensor) -> str | None:
    """Why the kernels do not take these; they read tiles by tensor-map, which wants rows that begin every 16 bytes."""
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
        return "precisions differ"
    if tensors[0].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return "the kernel takes 16 and 32 bits"
    if any(tensor.shape[-1] * tensor.element_size() % 16 for tensor in tensors):
        return "rows are not multiples of 16 bytes"
    return None


@jit
def _tiles_of_experts(ends, experts, across, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Of each expert (PADDED with empty ones): where its rows begin and end, and the tiles of it and those before."""
    index = tl.arange(0, PADDED)
    begin = tl.load(ends + index - 1, mask=(index > 0) & (index < experts), other=0)
    end = tl.load(ends + index, mask=index < experts, other=0)
    size = tl.where(index < experts, end - begin, 0)
    tiles = tl.cdiv(size, ROWS) * across
    return index, begin, size, tiles, tl.cumsum(tiles)


@jit
def _place(tile, down, across, TOGETHER: tl.constexpr):
    """Row and column of a tile of down x across, such that neighbours read the same: columns of TOGETHER tiles."""
    group = tile // (TOGETHER * across)
    within = tile % (TOGETHER * across)
    abreast = tl.minimum(down - group * TOGETHER, TOGETHER)
    return group * TOGETHER + within % abreast, within // abreast


@jit(do_not_specialize=["rows", "experts"])
def _rows_kernel(
    x,
    w,
    y,
    into,
    ends,
    rows,
    outer,
    inner,
    experts,
    INNER_FIRST: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """y[r] = x[r] @ w[e] for INNER_FIRST, else x[r] @ w[e].T. Tiles go by expert, then by TOGETHER runs of rows."""
    across = tl.cdiv(outer, COLUMNS)
    index, begin, size, tiles, through = _tiles_of_experts(ends, experts, across, PADDED, ROWS)
    program = tl.program_id(0)
    for tile in tl.range(program, tl.sum(tiles), PROGRAMS):
        expert = tl.sum((through <= tile).to(tl.int32))
        mine = index == expert
        first = tl.sum(tl.where(mine, begin, 0))
        count = tl.sum(tl.where(mine, size, 0))
        at = tile - tl.sum(tl.where(mine, through - tiles, 0))
        row, column = _place(at, tl.cdiv(count, ROWS), across, TOGETHER)
        row, column = first + row * ROWS, column * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, inner, DEPTH):
            left = x.load([row, depth])
            if INNER_FIRST:
                right = w.load([expert, depth, column]).reshape(DEPTH, COLUMNS)
                total = tl.dot(left, right, total, input_precision="ieee")
            else:
                right = w.load([expert, column, depth]).reshape(COLUMNS, DEPTH)
                total = tl.dot(left, right.T, total, input_precision="ieee")
        result = total.to(into.dtype.element_ty)
        if row + ROWS <= first + count:
            y.store([row, column], result)
        else:
            # The tile's corner may lie beyond 2^31 elements; within it 32 bits do, and registers are short.
            corner = into + row.to(tl.int64) * outer + column
            r = tl.arange(0, ROWS)[:, None]
            c = tl.arange(0, COLUMNS)[None, :]
            tl.store(corner + (r * outer + c), result, mask=(r < first + count - row) & (c < outer - column))
    _clear(into, tl.load(ends + experts - 1), rows, outer, program, PROGRAMS, COLUMNS)


@jit
def _clear(into, first, rows, width, program, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeroes rows that belong to no expert."""
    for row in range(first + program, rows, PROGRAMS):
        for column in range(0, width, COLUMNS):
            c = column + tl.arange(0, COLUMNS)
            zeros = tl.zeros((COLUMNS,), into.dtype.element_ty)
            place = into + (row + tl.zeros((COLUMNS,), tl.int64)) * width + c
            tl.store(place, zeros, mask=c < width)


@jit(do_not_specialize=["experts"])
def _experts_kernel(
    grad,
    x,
    w,
    ends,
    outer,
    inner,
    experts,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """w[e] = grad[run of e].T @ x[run of e]. Tiles go by expert, then by TOGETHER runs of w's rows."""
    across = tl.cdiv(inner, COLUMNS)
    down = tl.cdiv(outer, ROWS)
    for tile in tl.range(tl.program_id(0), experts * down * across, PROGRAMS):
        expert = tile // (down * across)
        row, column = _place(tile % (down * across), down, across, TOGETHER)
        row, column = row * ROWS, column * COLUMNS
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends + expert)
        full = begin + (end - begin) // DEPTH * DEPTH
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(begin, full, DEPTH):
            total = tl.dot(grad.load([depth, row]).T, x.load([depth, column]), total, input_precision="ieee")
        if full < end:
            # What follows an expert's rows is another's or nobody's, and may be NaN, which no factor of 0 removes.
            inside = (full + tl.arange(0, DEPTH) < end)[:, None]
            left = tl.where(inside, grad.load([full, row]), 0.0)
            right = tl.where(inside, x.load([full, column]), 0.0)
            total = tl.dot(left.T, right, total, input_precision="ieee")
        w.store([expert, row, column], total.to(w.dtype).reshape(1, ROWS, COLUMNS))


_FEW = 16
"""Experts, up to which one kernel serves any number: copies of experts may be more or fewer in every step."""


@dataclass(frozen=True)
class _Tile:
    """What one program computes at a time, and in what pieces it sums."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Of a launch; neighbours share the rows of TOGETHER tiles."""
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "TOGETHER": 16}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}

    @staticmethod
    def of(rows: Tensor) -> _Tile:
        if INTERPRETED:
            return _Tile(32, 32, 16, 4, 1)
        if rows.dtype == torch.float32:
            return _Tile(64, 64, 32, 4, 2)
        return _Tile(128, 256, 64, 8, 3)


def _by_rows(rows: Tensor, weights: Tensor, ends: Tensor, *, inner_first: bool) -> Tensor:
    rows, weights = rows.contiguous(), weights.contiguous()
    outer, inner = weights.shape[2 if inner_first else 1], rows.shape[1]
    result = rows.new_empty(len(rows), outer)
    if not result.numel():
        return result
    tile = _Tile.of(rows)
    block = [1, tile.depth, tile.columns] if inner_first else [1, tile.columns, tile.depth]
    count = programs(rows)
    _rows_kernel[(count,)](
        TensorDescriptor.from_tensor(rows, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weights, block),
        TensorDescriptor.from_tensor(result, [tile.rows, tile.columns]),
        result,
        ends,
        len(rows),
        outer,
        inner,
        len(ends),
        INNER_FIRST=inner_first,
        PADDED=max(_FEW, triton.next_power_of_2(len(ends))),
        PROGRAMS=count,
        **tile.options,
    )
    return result


def _by_experts(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    grad, rows = grad.contiguous(), rows.contiguous()
    result = rows.new_empty(len(ends), grad.shape[1], rows.shape[1])
    if not len(rows):
        return result.zero_()
    tile = _Tile.of(rows)
    count = programs(rows)
    _experts_kernel[(count,)](
        TensorDescriptor.from_tensor(grad, [tile.depth, tile.rows]),
        TensorDescriptor.from_tensor(rows, [tile.depth, tile.columns]),
        TensorDescriptor.from_tensor(result, [1, tile.rows, tile.columns]),
        ends,
        grad.shape[1],
        rows.shape[1],
        len(ends),
        PROGRAMS=count,
        **tile.options,
    )
    return result
