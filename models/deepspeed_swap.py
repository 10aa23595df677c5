"""The reference model's layers with their activations swapped and recomputed by token (`parallel.offload`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from models.deepspeed_experts import FullyShardedExperts
from models.reference import Context, Layer, Routing
from models.sparse_experts import Here, SparseExperts
from parallel.offload import WHOLE, Swap


def swap_layers(decoder: nn.Module, swap: Swap) -> None:
    """Have a decoder's layers do so; once everything else that divides them is done."""
    for layer in decoder.modules():
        if isinstance(layer, Layer):
            layer.forward = partial(_forward, swap, layer, layer.forward)


def _forward(
    swap: Swap,
    layer: Layer,
    plain: Callable[[Tensor, Context], tuple[Tensor, Tensor]],
    hidden: Tensor,
    context: Context,
) -> tuple[Tensor, Tensor]:
    """`Layer.forward`, which is `plain` but for what is kept."""
    if not torch.is_grad_enabled():
        return plain(hidden, context)
    if WHOLE in swap.again:
        made: tuple[Tensor, Tensor] = swap.recomputed(lambda hidden: plain(hidden, context), hidden, layer)
        return made
    sparse = _sparse_experts(layer)
    if sparse is not None:
        hidden = sparse.send_for_copies(hidden)
    first = hidden.transpose(0, 1)  # tokens before rows, which a cut of tokens then leaves in one piece
    visit, here = swap.visit(first, layer), None
    attention = layer.attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        return attention.core(*heads, context.documents).permute(2, 0, 1, 3).flatten(2)

    query, key, value = visit.by_token(partial(_project, layer), first, context.positions.T)
    mixed = visit.whole(attend, query, key, value)
    if hasattr(layer, "ffn"):
        (out,) = visit.by_token(partial(_finish, layer), first, mixed, again="mlp" in swap.again)
        auxiliary = hidden.new_zeros(())
    else:
        total, normed = visit.by_token(partial(_add, layer), first, mixed)

        def route(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            routing = layer.moe.router(tokens.transpose(0, 1), None)
            return routing.experts.transpose(0, 1), routing.weights.transpose(0, 1), routing.auxiliary

        experts, weights, auxiliary = visit.whole(route, normed)
        if sparse is not None:
            weights, here = sparse.enter(weights, experts.flatten().bincount(minlength=sparse.experts))
            visit.beside(*here.weights)
        mix = partial(_mix, layer, sparse, here)
        (out,) = visit.by_token(mix, total, normed, experts, weights, again="moe" in swap.again)
    last = visit.close(out)
    if sparse is not None and here is not None:
        last = sparse.leave(last, here)
    return last.transpose(0, 1).contiguous(), auxiliary


def _sparse_experts(layer: Layer) -> SparseExperts | None:
    experts = layer.moe.experts if hasattr(layer, "moe") else None
    return experts.sparse if isinstance(experts, FullyShardedExperts) else None


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


def _mix(
    layer: Layer,
    sparse: SparseExperts | None,
    here: Here | None,
    total: Tensor,
    normed: Tensor,
    experts: Tensor,
    weights: Tensor,
) -> Sequence[Tensor]:
    routing = Routing(experts.transpose(0, 1), weights.transpose(0, 1), total.new_zeros(()))
    with nullcontext() if sparse is None or here is None else sparse.computing_with(here):
        return (total + layer.moe.mixed(normed.transpose(0, 1), routing).transpose(0, 1),)
