"""Collectives that autograd sees through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group)
    return out


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Give each rank of `group` its rows: the first `sent[0]` to rank 0, and so on; get `received[i]` from rank i.

    rows [sum(sent), ...] -> [sum(received), ...], in the order of the ranks they come from.
    Forward: an all-to-all of the rows as they are, nothing padded; a rank sends all but its own part.
    Backward: the same all-to-all of the gradients, the other way.
    """
    out: Tensor = _ExchangeRows.apply(rows, sent, received, group)
    return out
