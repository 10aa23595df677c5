"""Sequence parallelism by DeepSpeed-Ulysses (Jacobs et al. 2023) for the reference model, applied from outside.

A rank holds one contiguous part of every row. Everything but attention looks at one token at a time; for attention, an
all-to-all gives each rank whole rows of its share of the heads, and another gives the rows' parts back.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from models.deepspeed_fusions import attend
from models.reference import Attention, Context, Router, positions_of
from parallel.sums import sum_everywhere


def split_sequence(decoder: nn.Module, group: dist.ProcessGroup) -> None:
    """Make `decoder`, a Decoder or a stage of one, compute on parts of rows as if it saw them whole.

    That the group's size divides a layer's kv_heads, after tensor parallelism, is the caller's to check.
    """
    for module in decoder.modules():
        match module:
            case Attention():
                module.core = UlyssesAttention(group)
            case Router():
                module.row_mean = partial(_row_mean, group=group)


def part_of_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of [batch, sequence]."""
    return rows.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)]


def part_of_context(tokens: Tensor, documents: Tensor | None, group: dist.ProcessGroup) -> Context:
    """What a layer is told of this rank's part of rows, of which all [batch, sequence] tokens are given.

    Positions are the part's; documents are whole, as attention sees whole rows.
    """
    return Context(part_of_rows(positions_of(tokens, documents), group), documents)


class UlyssesAttention(nn.Module):
    """An AttentionCore on parts of rows: [batch, heads, sequence / cp, head_dim], as DeepSpeed's DistributedAttention.

    Forward: all-to-alls of query, key, value and of the output, of which a rank sends all but its own part, 1/cp.
    Backward: the same of their gradients, the other way.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._exchange = DistributedAttention(_whole_rows, group, scatter_idx=2, gather_idx=1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
        by_token = (heads.transpose(1, 2) for heads in (query, key, value))
        out: Tensor = self._exchange(*by_token, 0, documents=documents)
        return out.transpose(1, 2)


def _whole_rows(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """[batch, sequence, heads / cp, head_dim] each."""
    by_head = (heads.transpose(1, 2) for heads in (query, key, value))
    return attend(*by_head, documents).transpose(1, 2).contiguous()


def _row_mean(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Over whole rows of which x [batch, sequence / cp, ...] is a part; each rank's loss is of all that it sees.

    Forward and backward: an all-reduce of [batch, ...] each.
    """
    return sum_everywhere(x.mean(1), group) / dist.get_world_size(group)
