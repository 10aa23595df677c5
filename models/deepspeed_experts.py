"""Expert parallelism for the reference model, in the terms by which DeepSpeed recognises experts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from models.reference import Experts, Routing
from parallel.collectives import exchange_rows

EXPERT_GROUP = "experts"
"""The name by which DeepSpeed knows the groups of expert parameters."""


class ParallelExperts(DeepSpeedMoE):
    """This rank's part of `models.reference.Experts`, which sends tokens to the ranks that hold their experts.

    Every routed token is sent, none is padded or dropped. Experts keep their numbers as names, so that the model's
    tensors are named as on one device. It is a DeepSpeed MoE layer in name only: that is how DeepSpeed knows that there
    are parameters to be reduced over fewer ranks than the others, which it tells by their marks.
    """

    def __init__(self, experts: Experts, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self._group = group
        self.num_experts = len(experts)
        held = self.num_experts // dist.get_world_size(group)
        first = held * dist.get_rank(group)
        for index in range(first, first + held):
            self.add_module(str(index), experts[index])

    def mark(self) -> None:
        """Tell DeepSpeed that these parameters differ between ranks; once they are in memory, since a move forgets."""
        for parameter in self.parameters():
            parameter.allreduce, parameter.group_name = False, EXPERT_GROUP

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed would make its groups here; they are those of the layout, and made already."""

    def forward(self, hidden: Tensor, routing: Routing) -> Tensor:
        """Hidden states [batch, sequence, hidden] -> the weighted sum of what each token's experts make of it.

        Forward and backward: each an all-to-all there and one back, in all 4 * top_k * tokens * hidden elements a rank,
        less what stays on it; and one, forward, of as many counts as there are experts.
        """
        tokens = hidden.flatten(0, 1)
        chosen, top_k = routing.experts.flatten(), routing.experts.shape[-1]
        # A token's copies are taken by a permutation, whose backward adds nothing up in an order of its own.
        copies = tokens[:, None].expand(-1, top_k, -1).flatten(0, 1)
        by_expert = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).view(dist.get_world_size(self._group), -1)
        counts_here = torch.empty_like(counts)
        dist.all_to_all_single(counts_here, counts, group=self._group)
        sent, received = counts.sum(1).tolist(), counts_here.sum(1).tolist()
        arrived = exchange_rows(copies[by_expert], sent, received, self._group)
        returned = exchange_rows(self._compute(arrived, counts_here), received, sent, self._group)
        mixed = returned[by_expert.argsort()].unflatten(0, (-1, top_k)) * routing.weights.flatten(0, 1)[..., None]
        return mixed.sum(1).view_as(hidden)

    def _compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows lie by the rank they came from, then by expert; `counts` [ranks, experts here]."""
        source, held = counts.shape
        expert_of = torch.arange(held, device=rows.device).repeat(source).repeat_interleave(counts.flatten())
        by_expert = expert_of.argsort(stable=True)
        parts = rows[by_expert].split(counts.sum(0).tolist())
        # An expert that nobody chose computes no rows, and has zeros for gradients rather than none.
        made = [expert(part) for expert, part in zip(self.children(), parts, strict=True)]
        return torch.cat(made)[by_expert.argsort()]
