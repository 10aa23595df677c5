"""The router of a Megatron mixture: its gate, losses and dispatchers, with a choice that is ours."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from jobs.architecture import ModelArchitecture
from kernels.router import Rule, gate, route


class Router(TopKRouter):
    """Chooses experts as `models.reference.Router` does, for the tokens that this rank sees.

    Megatron's own choice differs from it in five ways: its sigmoid weights are always normalised; it has no bias with
    softmax; what it drops of a bias's choices it does not count as load; in bf16 training it counts load in bf16, which
    stands still at 256; and of the tokens that chose an expert it keeps "by position" any, since its top-k of equal
    numbers is whichever comes.
    """

    def __init__(
        self,
        model: ModelArchitecture,
        *,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.model = model
        self._rule = Rule(model.router_score, model.top_k, model.router_normalize_top_k, model.router_scale)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Hidden states [sequence, batch, hidden] -> logits [sequence, batch, experts] in fp32."""
        return gate(input.flatten(0, 1), self.weight).unflatten(0, input.shape[:2])

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 logits [sequence, batch, experts] -> weights, and which are chosen (bool), both [tokens, experts].

        Communicates only for the balancing loss: one all-reduce of a count an expert and a row over tp x cp.
        """
        model = self.model
        sequence, batch, _ = logits.shape
        logits = self.apply_z_loss(logits.flatten(0, 1))
        weights, chosen, counts = route(logits, self._rule, self.expert_bias)
        if self.training and torch.is_grad_enabled():  # once, if the forward pass is computed again in backward
            if self.expert_bias is not None:
                self.local_tokens_per_expert += counts
            if model.aux_loss:
                by_score, share = compute_routing_scores_for_aux_loss(logits, model.top_k, model.router_score)
                weights = self._apply_seq_aux_loss(weights, share, by_score, sequence, batch)
        if model.capacity_factor:
            chosen = chosen & has_place(chosen, weights.detach(), model)
            weights = weights * chosen
        return weights, chosen

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        """Moves as any module, but for the bias and the counts of load, which stay fp32 in a bf16 model."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


def has_place(chosen: torch.Tensor, weights: torch.Tensor, model: ModelArchitecture) -> torch.Tensor:
    """Who is among the ceil(tokens * top_k / experts * capacity_factor) that each expert takes, [tokens, experts].

    `chosen` (bool) and `weights` (0 where not chosen) are [tokens, experts], tokens in the order of their positions.
    An expert takes the largest weights, of equal ones the earliest; or simply the earliest of those that chose it.
    """
    capacity = math.ceil(len(chosen) * model.top_k / model.experts * model.capacity_factor)
    if model.drop_order == "position":
        return chosen.cumsum(0) <= capacity
    first = weights.argsort(dim=0, descending=True, stable=True)[:capacity]
    return torch.zeros_like(chosen).scatter(0, first, True)
