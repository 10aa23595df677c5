"""A layout's groups of ranks, as torch.distributed knows them."""

from __future__ import annotations

import torch.distributed as dist

from parallel.layout import Layout


def new_group(layout: Layout, *axes: str) -> dist.ProcessGroup:
    """Collective: this rank's group of those that `layout.groups(*axes)` lists, of which all are made."""
    mine, rank = None, dist.get_rank()
    for members in layout.groups(*axes):
        group = dist.new_group(list(members))
        if rank in members:
            mine = group
    assert mine is not None, "every rank is in one group along any axes"
    return mine
