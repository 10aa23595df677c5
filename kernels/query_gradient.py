"""The gradient of attention's queries, each summed over its keys in one order.

cuDNN's backward gives the keys' and values' gradients alike from equal inputs, and the queries' by atomics; in
deterministic training this makes them anew, at three products of the five that a whole backward takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.choice import INTERPRETED, TensorDescriptor, jit, tl


def query_gradient(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> Tensor:
    """As `kernels.attention.attend_backward` gives it (FlashAttention-2, Dao 2023), wherever Triton runs.

    Lengths must be multiples of 64, head_dim a power of 2 up to 128, and elements of a head lie together.
    """
    result = torch.empty_like(query)
    batch, heads, queries, width = query.shape
    rows, columns = (32, 16) if INTERPRETED else (64, 64)
    blocks = (
        *(_tiles(tensor, rows) for tensor in (grad, query, out)),
        *(_tiles(tensor, columns) for tensor in (key, value)),
        _tiles(result, rows),
    )
    _kernel[(queries // rows, batch * heads)](
        *blocks,
        lse.contiguous(),
        heads,
        heads // key.shape[1],
        queries,
        key.shape[2],
        scale,
        CAUSAL=causal,
        WIDTH=width,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
        num_stages=2,
    )
    return result


def _tiles(tensor: Tensor, length: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, length, tensor.shape[-1]])


@jit
def _kernel(
    grad,
    query,
    out,
    key,
    value,
    result,
    lse,
    heads,
    shared,
    queries,
    keys,
    scale,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program a tile of queries; those that see the most keys first."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    of_out = grad.load([batch, head, first, 0]).reshape(ROWS, WIDTH)
    mine = query.load([batch, head, first, 0]).reshape(ROWS, WIDTH)
    made = out.load([batch, head, first, 0]).reshape(ROWS, WIDTH)
    balance = tl.sum(of_out.to(tl.float32) * made.to(tl.float32), 1)[:, None]
    row = first + tl.arange(0, ROWS)
    log_sum = tl.load(lse + tl.program_id(1).to(tl.int64) * queries + row)[:, None] * 1.4426950408889634
    log_scale = scale * 1.4426950408889634
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    before = first if CAUSAL else keys
    for column in range(0, before, COLUMNS):
        there = key.load([batch, head // shared, column, 0]).reshape(COLUMNS, WIDTH)
        what = value.load([batch, head // shared, column, 0]).reshape(COLUMNS, WIDTH)
        score = tl.dot(mine, there.T, input_precision="ieee")
        share = tl.exp2(score * log_scale - log_sum)
        of_share = tl.dot(of_out, what.T, input_precision="ieee")
        of_score = (share * (of_share - balance)).to(there.dtype)
        total = tl.dot(of_score, there, total, input_precision="ieee")
    if CAUSAL:
        for column in range(first, first + ROWS, COLUMNS):
            there = key.load([batch, head // shared, column, 0]).reshape(COLUMNS, WIDTH)
            what = value.load([batch, head // shared, column, 0]).reshape(COLUMNS, WIDTH)
            score = tl.dot(mine, there.T, input_precision="ieee")
            seen = row[:, None] >= column + tl.arange(0, COLUMNS)[None, :]
            share = tl.where(seen, tl.exp2(score * log_scale - log_sum), 0.0)
            of_share = tl.dot(of_out, what.T, input_precision="ieee")
            of_score = (share * (of_share - balance)).to(there.dtype)
            total = tl.dot(of_score, there, total, input_precision="ieee")
    result.store([batch, head, first, 0], (total * scale).to(result.dtype).reshape(1, 1, ROWS, WIDTH))
