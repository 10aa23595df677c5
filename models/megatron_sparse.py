"""A Megatron mixture under FSSDP: `models.sparse_experts` in the places of Megatron's experts and of its dispatcher."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from jobs.architecture import ModelArchitecture
from models.megatron_dispatch import DepartingDispatcher
from models.megatron_specs import Layer
from models.sparse_experts import Away, Owned, SparseExperts
from parallel.collectives import Lane
from parallel.fssdp import Means


class FullyShardedExperts(SparseExperts):
    """Called as Megatron calls experts, but for tokens that are still where they were routed."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        model: ModelArchitecture,
        lane: Lane,
        means: Means,
    ) -> None:
        def weight(*shape: int) -> nn.Parameter:
            made = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
            set_tensor_model_parallel_attributes(made, is_parallel=True, dim=0, stride=1)
            return made

        width, hidden, places = config.moe_ffn_hidden_size, config.hidden_size, range(num_local_experts)
        gate_up, down = [weight(2, width, hidden) for _ in places], [weight(hidden, width) for _ in places]
        super().__init__(model, gate_up, down, lane, pg_collection.ep, means)
        self.config, self._replicas = config, pg_collection.expt_dp

    def forward(self, away: Away, chosen: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        return super().forward(away), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> ShardedStateDict:
        """As `models.megatron_experts` stores them. Only of experts that lie as expert parallelism has them."""
        places = len(self.gate_up)
        first = places * dist.get_rank(self._group)
        state = make_sharded_tensors_for_checkpoint(
            {"chosen": self.chosen, "history": self.history}, prefix, {}, sharded_offsets
        )
        for at in range(places):
            for name, stored, parts in (("gate_up", "linear_fc1", 2), ("down", "linear_fc2", 1)):
                state[f"{prefix}{name}.{at}"] = expert_factory(
                    f"{prefix}experts.{stored}.weight",
                    getattr(self, name)[at],
                    sharded_offsets,
                    (first + at, self.experts),
                    parts,
                    self._replicas.rank(),
                )
        return state


def expert_factory(
    key: str, tensor: Tensor, layers: tuple[Any, ...], expert: tuple[int, int], parts: int, replica: int
) -> ShardedTensorFactory:
    """Of one expert, a whole tensor or `parts` of one; `expert`: its number, and how many there are."""
    place = len(layers)

    def build(name: str, whole: Tensor, replica_id: ReplicaId, flattened: Any) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(
                name,
                part,
                *layers,
                (place, *expert),
                (place + 1, number, parts),
                replica_id=replica_id,
                prepend_axis_num=place + 1,
            )
            for number, part in enumerate(whole.view(parts, -1, whole.shape[-1]))
        ]

    def merge(stored: list[Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.stack(stored).view(tensor.shape)

    return ShardedTensorFactory(key, tensor, build, merge, (0, 0, replica))


class SparseDispatcher(DepartingDispatcher):
    """Has experts send their tokens themselves."""

    def __init__(self, experts: SparseExperts, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config, groups)
        self._experts = experts

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self._shape, self._chosen = hidden_states.shape, routing_map
        return hidden_states.flatten(0, -2), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Away, Tensor]:
        return self._experts.depart(hidden_states, self._chosen, probs), probs

    def dispatch_postprocess(self, hidden_states: Away, probs: Tensor) -> tuple[Away, Tensor, Tensor]:
        return hidden_states, self._chosen, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.view(self._shape)


def sharded_experts(model: ModelArchitecture, lane: Lane, means: Means) -> ModuleSpec:
    """For `models.megatron_specs.build_model`, whose model `share_experts` is then to be given."""
    return ModuleSpec(FullyShardedExperts, {"model": model, "lane": lane, "means": means}, MLPSubmodules())


def share_experts(model: nn.Module) -> Owned | None:
    """Have a model built with these experts send tokens to them; None where it has none."""
    layers = {}
    for layer in model.modules():
        if isinstance(layer, Layer) and isinstance(layer.mlp, MoELayer):
            mixture = layer.mlp
            groups = get_default_pg_collection()
            mixture.token_dispatcher = SparseDispatcher(mixture.experts, mixture.config, groups)
            layers[layer.layer_number - 1] = mixture.experts
            if not mixture.moe_layer_recompute:  # which is to have its copies where it is computed again
                layer.send_first = mixture.experts.send_for_copies
    return Owned(layers) if layers else None
