"""A Megatron mixture under FSSDP: `models.sparse_experts` in the places of Megatron's experts and of its dispatcher."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from jobs.architecture import ModelArchitecture
from models.megatron_dispatch import DepartingDispatcher
from models.megatron_experts import stored, weights_of
from models.megatron_specs import Layer
from models.sparse_experts import Away, SparseExperts
from models.sparse_owners import Owned
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
        super().__init__(model, *weights_of(num_local_experts, config, pg_collection), lane, pg_collection.ep, means)
        self.config, self._groups = config, pg_collection

    def forward(self, away: Away, chosen: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        return super().forward(away), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> ShardedStateDict:
        """As `models.megatron_experts` stores them. Only of experts that lie as expert parallelism has them."""
        state = make_sharded_tensors_for_checkpoint(
            {"chosen": self.chosen, "history": self.history}, prefix, {}, sharded_offsets
        )
        return state | stored(prefix, self.gate_up, self.down, sharded_offsets, self._groups)


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
