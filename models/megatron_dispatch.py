"""Dispatch of tokens to experts that are all on this rank: a permutation, which waits for nothing."""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor, nn

from kernels.permute import Order, combine, order_by_expert, permute, permute_weights


def dispatch_locally(model: nn.Module) -> None:
    """Give the layers of `model` whose experts are all on their rank the dispatcher that communicates nothing.

    Megatron's own would ask the device how many tokens each expert has. Where experts have a capacity, that stays so.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            own = module.token_dispatcher
            if own.ep_size * own.tp_size == 1 and own.config.moe_expert_capacity_factor is None:
                module.token_dispatcher = LocalDispatcher(own.config, get_default_pg_collection())


class LocalDispatcher(MoETokenDispatcher):
    """Megatron's steps of a dispatcher, of which two have something to do."""

    _order: Order

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self._shape = hidden_states.shape
        self._order = order_by_expert(routing_map, self.config.moe_router_topk)
        return hidden_states.flatten(0, -2), probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [tokens, hidden] and weights [tokens, experts] -> rows by expert, how many each has, their weights."""
        return permute(hidden_states, self._order), self._order.counts, permute_weights(probs, self._order)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return combine(hidden_states, self._order)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.view(self._shape)
