"""The reference model's experts as DeepSpeed trains them: a layer's in two tensors, on one rank or over several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from kernels.experts import expert_mlp
from kernels.permute import Order, combine, order_by_expert, permute, permute_weights
from models.reference import Context, Experts, Layer, MoE, Routing
from models.sparse_experts import SparseExperts
from parallel.collectives import Lane, exchange_rows
from parallel.fssdp import Means

EXPERT_GROUP = "experts"
"""The name by which DeepSpeed knows the groups of expert parameters."""

Index = tuple[int, ...]


class ExpertMLP(nn.Module):
    """`gate_up` [experts, 2, width, hidden], gate first, and `down` [experts, hidden, width] of experts in a row."""

    def __init__(self, experts: Experts, first: int, held: int) -> None:
        """first: the number, among `experts`, of the first of the `held` that are here."""
        super().__init__()
        self.numbers = range(first, first + held)
        """Not told by the parameters, whose shape ZeRO-3 takes away."""
        width, hidden = experts[0].gate.weight.shape
        empty = experts[0].gate.weight.new_empty
        self.gate_up = nn.Parameter(empty(held, 2, width, hidden))
        self.down = nn.Parameter(empty(held, hidden, width))

    def forward(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Rows by expert [rows, hidden], their routers' weights [rows], how many each expert has -> [rows, hidden]."""
        return expert_mlp(rows, weights, counts.cumsum(0, dtype=torch.int32), self.gate_up.flatten(1, 2), self.down)


class GroupedExperts(nn.Module):
    """`models.reference.Experts`, all on this rank, computed together (`kernels.experts`)."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.mlp = ExpertMLP(experts, 0, len(experts))
        self._experts = len(experts)

    def forward(self, hidden: Tensor, routing: Routing) -> Tensor:
        """Hidden states [batch, sequence, hidden] -> the weighted sum of what each token's experts make of it."""
        order, weights = _ordered(routing, self._experts)
        made = self.mlp(permute(hidden.flatten(0, 1), order), weights, order.counts)
        return combine(made, order).view_as(hidden)


class ParallelExperts(DeepSpeedMoE):
    """This rank's part of `models.reference.Experts`, which sends tokens to the ranks that hold their experts.

    Every routed token is sent, none is padded or dropped. It is a DeepSpeed MoE layer in name only: that is how
    DeepSpeed knows that there are parameters to be reduced over fewer ranks than the others, which it tells by their
    marks.
    """

    def __init__(self, experts: Experts, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self._group = group
        self.num_experts = len(experts)
        held = self.num_experts // dist.get_world_size(group)
        self.mlp = ExpertMLP(experts, held * dist.get_rank(group), held)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed would make its groups here; they are those of the layout, and made already."""

    def forward(self, hidden: Tensor, routing: Routing) -> Tensor:
        """Hidden states [batch, sequence, hidden] -> the weighted sum of what each token's experts make of it.

        Forward and backward: each an all-to-all there and one back, in all 4 * top_k * tokens * hidden elements a rank,
        less what stays on it; and one each way of as many weights as there are copies, and, forward, of as many counts
        as there are experts.
        """
        order, weights = _ordered(routing, self.num_experts)
        counts = order.counts.view(dist.get_world_size(self._group), -1)
        counts_here = torch.empty_like(counts)
        dist.all_to_all_single(counts_here, counts, group=self._group)
        sent, received = torch.stack((counts.sum(1), counts_here.sum(1))).tolist()
        rows = exchange_rows(permute(hidden.flatten(0, 1), order), sent, received, self._group)
        made = self._compute(rows, exchange_rows(weights, sent, received, self._group), counts_here)
        return combine(exchange_rows(made, received, sent, self._group), order).view_as(hidden)

    def _compute(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Rows and weights lie by the rank they came from, then by expert; `counts` [ranks, experts here]."""
        source, held = counts.shape
        expert_of = torch.arange(held, device=rows.device).repeat(source).repeat_interleave(counts.flatten())
        by_expert = expert_of.argsort(stable=True)
        order = Order(
            row_of=by_expert.argsort().int()[:, None], token_of=by_expert.int(), cell_of=by_expert, counts=counts.sum(0)
        )
        return combine(self.mlp(permute(rows, order), permute_weights(weights[:, None], order), order.counts), order)


class FullyShardedExperts(DeepSpeedMoE):
    """`models.reference.Experts` under FSSDP, see `models.sparse_experts`; to DeepSpeed as `ParallelExperts`."""

    def __init__(self, sparse: SparseExperts) -> None:
        nn.Module.__init__(self)
        self.num_experts = sparse.experts
        self.sparse = sparse

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing to make."""

    def forward(self, hidden: Tensor, routing: Routing) -> Tensor:
        """As `ParallelExperts`."""
        chosen, weights = _spread(routing, self.num_experts)
        out: Tensor = self.sparse(self.sparse.depart(hidden.flatten(0, 1), chosen, weights))
        return out.view_as(hidden)


def shard_experts(decoder: nn.Module, group: dist.ProcessGroup, lane: Lane, means: Means) -> dict[int, SparseExperts]:
    """Have a decoder's mixtures computed so, over `group`. By layer; once they have memory, make them an `Owned`."""
    layers = {}
    for name, layer in decoder.named_modules():
        if not isinstance(layer, Layer) or not hasattr(layer, "moe"):
            continue
        experts = layer.moe.experts
        width, hidden = experts[0].gate.weight.shape
        empty = experts[0].gate.weight.new_empty
        places = len(experts) // dist.get_world_size(group)
        sparse = SparseExperts(
            layer.moe.router.model,
            nn.Parameter(empty(places, 2, width, hidden)),
            nn.Parameter(empty(places, hidden, width)),
            *(lane, group, means),
        )
        layer.moe.experts = FullyShardedExperts(sparse)
        layer.forward = partial(_send_first, sparse, layer.forward)
        layers[int(name.rpartition(".")[2])] = sparse
    return layers


def _send_first(
    sparse: SparseExperts, forward: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, context: Context
) -> tuple[Tensor, Tensor]:
    return forward(sparse.send_for_copies(hidden), context)


def mark_experts(decoder: nn.Module) -> None:
    """Tell DeepSpeed that these parameters differ between ranks; once they are in memory, since a move forgets."""
    for module in decoder.modules():
        if isinstance(module, DeepSpeedMoE):
            for parameter in module.parameters():
                parameter.allreduce, parameter.group_name = False, EXPERT_GROUP


def group_experts(decoder: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Have a decoder's mixtures computed so, over `group` if there is one. It may be without memory yet."""
    for module in decoder.modules():
        if isinstance(module, MoE):
            experts = module.experts
            module.experts = GroupedExperts(experts) if group is None else ParallelExperts(experts, group)


def parts_of(decoder: nn.Module) -> Iterator[tuple[nn.Parameter, list[tuple[Index, str]]]]:
    """Each parameter with what of `jobs.tensors` it holds, and where in it; all of it: ()."""
    for name, parameter in decoder.named_parameters():
        owner, _, own = name.rpartition(".")
        module = decoder.get_submodule(owner)
        if isinstance(module, ExpertMLP):
            yield parameter, _parts(owner.removesuffix("mlp"), module.numbers, own)
        elif isinstance(module, SparseExperts):  # that lie as expert parallelism has them
            yield parameter, _parts(owner.removesuffix("sparse"), module.even.held_by(module.rank), own)
        else:
            yield parameter, [((), name)]


def _parts(experts: str, numbers: Sequence[int], name: str) -> list[tuple[Index, str]]:
    """Where in the parameter `name` which tensor of experts with these numbers is; experts: their names' begin."""
    if name == "down":
        return [((index,), f"{experts}{number}.down.weight") for index, number in enumerate(numbers)]
    return [
        ((index, at), f"{experts}{number}.{half}.weight")
        for index, number in enumerate(numbers)
        for at, half in enumerate(("gate", "up"))
    ]


def _ordered(routing: Routing, experts: int) -> tuple[Order, Tensor]:
    """Where tokens' copies go, and the copies' weights, [tokens * top_k]."""
    chosen, weights = _spread(routing, experts)
    order = order_by_expert(chosen, routing.experts.shape[-1])
    return order, permute_weights(weights, order)


def _spread(routing: Routing, experts: int) -> tuple[Tensor, Tensor]:
    """Who is chosen (bool), and the weights, both [tokens, experts]."""
    chosen, weights = routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)
    empty = weights.new_zeros(len(chosen), experts)
    return empty.bool().scatter(1, chosen, True), empty.scatter(1, chosen, weights)
