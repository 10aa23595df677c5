"""Dispatch of tokens to experts by permutations that add nothing up by atomics, and wait for nothing on one rank."""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher
from torch import Tensor, nn

from kernels.permute import Order, combine, order_by_expert, permute, permute_weights
from parallel.collectives import Way


def dispatch_in_order(model: nn.Module) -> None:
    """Give mixtures of `model` a dispatcher of this module, but where experts have a capacity or tokens are gathered.

    Megatron's own adds a token's results up in any order on a GPU, and asks the device how many rows each expert has
    even where none leaves it.
    """
    for module in model.modules():
        if not isinstance(module, MoELayer):
            continue
        module.__class__ = Mixture  # not in the spec, where Megatron warns of mixtures that it does not know by name
        if module.config.moe_expert_capacity_factor is not None:
            continue
        own, groups = module.token_dispatcher, get_default_pg_collection()
        if own.ep_size * own.tp_size == 1:
            module.token_dispatcher = LocalDispatcher(module.config, groups)
        elif type(own) is MoEAlltoAllTokenDispatcher:
            module.token_dispatcher = OrderedDispatcher(
                module.num_local_experts, module.local_expert_indices, module.config, groups
            )


class Mixture(MoELayer):
    """Megatron's, whose shared experts compute while tokens are on their way to the others, forward and backward."""

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        if not isinstance(self.token_dispatcher, DepartingDispatcher):
            return super().shared_experts_compute(hidden_states)
        self._hidden = hidden_states
        return None

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        under_way = super().dispatch(hidden_states, probs)
        if isinstance(self.token_dispatcher, DepartingDispatcher):
            self._shared = super().shared_experts_compute(self._hidden)
        return under_way

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        if isinstance(self.token_dispatcher, DepartingDispatcher):
            shared_expert_output, self._shared, self._hidden = self._shared, None, None
        return super().postprocess(output, shared_expert_output)


class DepartingDispatcher(MoETokenDispatcher):
    """One whose tokens are under way between `token_dispatch` and `dispatch_postprocess`."""


class LocalDispatcher(MoETokenDispatcher):
    """Of tokens whose experts are all on their rank: of Megatron's steps, two have something to do."""

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


class OrderedDispatcher(MoEAlltoAllTokenDispatcher, DepartingDispatcher):
    """Megatron's all-to-alls, between permutations of `kernels.permute`."""

    _order: Order

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        counts = self.preprocess(routing_map)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", counts)
        self._order = order_by_expert(routing_map, self.config.moe_router_topk)
        return permute(hidden_states.flatten(0, -2), self._order), permute_weights(probs, self._order)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and weights set out; the next step has them there."""
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        self._ways = []
        for each in (hidden_states, probs):
            way = Way(self.input_splits, self.output_splits, self.ep_group)
            way.depart(each)
            self._ways.append(way)
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ways, self._ways = self._ways, []
        return super().dispatch_postprocess(*(way.arrive() for way in ways))

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        return combine(permutated_local_input_tokens, self._order).view(self.hidden_shape)
