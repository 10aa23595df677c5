"""The experts that a rank of a Megatron mixture holds: two tensors for all of them, computed together."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from kernels.experts import expert_mlp


class GroupedExperts(MegatronModule):
    """SwiGLU experts over runs of rows (`kernels.experts`); of what they compute, gate and up alone are kept.

    `gate_up` [experts here, 2 * width / etp, hidden], each rank's gate before its up, and `down` [experts here, hidden,
    width / etp]. Communicates nothing: over ETP, the dispatcher gathers rows before and adds up results after.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self._groups = pg_collection
        self.gate_up, self.down = weights_of(num_local_experts, config, pg_collection)

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        """Rows by expert [rows, hidden], how many each has, and their routers' weights [rows] -> [rows, hidden]."""
        ends = tokens_per_expert.cumsum(0, dtype=torch.int32).to(rows.device, non_blocking=True)
        return expert_mlp(rows, weights, ends, self.gate_up, self.down), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> ShardedStateDict:
        return stored(prefix, self.gate_up, self.down, sharded_offsets, self._groups)


def weights_of(
    experts: int, config: TransformerConfig, groups: ProcessGroupCollection
) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """`gate_up` and `down` of so many experts here, without values yet."""

    def weight(rows: int, columns: int, divided: int) -> torch.nn.Parameter:
        device = torch.cuda.current_device()
        made = torch.nn.Parameter(torch.empty(experts, rows, columns, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(made, is_parallel=True, dim=divided, stride=1)
        return made

    width = config.moe_ffn_hidden_size // groups.expt_tp.size()
    return weight(2 * width, config.hidden_size, 1), weight(config.hidden_size, width, 2)


def stored(
    prefix: str, gate_up: Tensor, down: Tensor, layers: tuple[Any, ...], groups: ProcessGroupCollection
) -> ShardedStateDict:
    """As Megatron stores experts one by one: a dimension of experts, the whole of gate before that of up."""
    return {
        f"{prefix}gate_up": _stored(f"{prefix}experts.linear_fc1.weight", gate_up, layers, groups, 0, 2),
        f"{prefix}down": _stored(f"{prefix}experts.linear_fc2.weight", down, layers, groups, 1, 1),
    }


def _stored(
    key: str, stack: Tensor, layers: tuple[Any, ...], groups: ProcessGroupCollection, divided: int, parts: int
) -> ShardedTensorFactory:
    """`stack` [experts here, ...], of which `parts` halves lie apart along the dimension that ETP divides."""
    held, place = len(stack), len(layers)
    first, experts = held * groups.ep.rank(), held * groups.ep.size()
    rank, degree = groups.expt_tp.rank(), groups.expt_tp.size()

    def build(name: str, whole: Tensor, replica: ReplicaId, flattened: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                name,
                half,
                *layers,
                (place, first + index, experts),
                (place + 1 + divided, rank + part * degree, degree * parts),
                replica_id=replica,
                prepend_axis_num=place + 1,
            )
            for index, expert in enumerate(whole)
            for part, half in enumerate(expert.chunk(parts, divided))
        ]

    def merge(stored: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.stack([torch.cat(stored[at : at + parts], divided) for at in range(0, len(stored), parts)])

    return ShardedTensorFactory(key, stack, build, merge, (0, 0, groups.expt_dp.rank()))
