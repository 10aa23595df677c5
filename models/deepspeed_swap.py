"""The reference model's layers with their activations swapped and recomputed by token (`parallel.offload`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models.reference import Context, Layer, Routing
from parallel.offload import Swap


def swap_layers(decoder: nn.Module, swap: Swap) -> None:
    """Have a decoder's layers do so; once everything else that divides them is done."""
    for layer in decoder.modules():
        if isinstance(layer, Layer):
            layer.forward = partial(_forward, swap, layer)


def _forward(swap: Swap, layer: Layer, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """`Layer.forward`."""
    if not torch.is_grad_enabled():
        return Layer.forward(layer, hidden, context)
    first = hidden.transpose(0, 1)  # tokens before rows, which a cut of tokens then leaves in one piece
    visit = swap.visit(first, layer)
    attention = layer.attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        return attention.core(*heads, context.documents).permute(2, 0, 1, 3).flatten(2)

    query, key, value = visit.by_token(partial(_project, layer), first, context.positions.T)
    mixed = visit.whole(attend, query, key, value)
    if hasattr(layer, "ffn"):
        (out,) = visit.by_token(partial(_finish, layer), first, mixed)
        auxiliary = hidden.new_zeros(())
    else:
        total, normed = visit.by_token(partial(_add, layer), first, mixed)

        def route(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            routing = layer.moe.router(tokens.transpose(0, 1), None)
            return routing.experts.transpose(0, 1), routing.weights.transpose(0, 1), routing.auxiliary

        experts, weights, auxiliary = visit.whole(route, normed)
        (out,) = visit.by_token(partial(_mix, layer), total, normed, experts, weights)
    return visit.close(out).transpose(0, 1).contiguous(), auxiliary


def _project(layer: Layer, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value, [tokens, batch, heads, head_dim]."""
    heads = layer.attention.projected(layer.attention_norm(hidden.transpose(0, 1)), positions.T)
    return tuple(each.permute(2, 0, 1, 3) for each in heads)


def _add(layer: Layer, hidden: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream behind attention, and normed."""
    total = hidden + layer.attention.output(mixed.transpose(0, 1)).transpose(0, 1)
    return total, layer.ffn_norm(total)


def _finish(layer: Layer, hidden: Tensor, mixed: Tensor) -> Sequence[Tensor]:
    total, normed = _add(layer, hidden, mixed)
    return (total + layer.ffn(normed.transpose(0, 1)).transpose(0, 1),)


def _mix(layer: Layer, total: Tensor, normed: Tensor, experts: Tensor, weights: Tensor) -> Sequence[Tensor]:
    routing = Routing(experts.transpose(0, 1), weights.transpose(0, 1), total.new_zeros(()))
    return (total + layer.moe.mixed(normed.transpose(0, 1), routing).transpose(0, 1),)
