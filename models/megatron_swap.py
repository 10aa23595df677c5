"""A Megatron layer with its activations swapped and recomputed by token (`parallel.offload`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from models.sparse_experts import SparseExperts
from parallel.offload import Swap


def swapped_forward(
    layer: TransformerLayer, swap: Swap, hidden: Tensor, documents: Tensor | None, angles: Tensor
) -> Tensor:
    """The layer's output [sequence, batch, hidden] of hidden states, on whichever ranks they lie.

    documents: what `models.megatron_attention` takes for Megatron's mask.
    """
    attention = layer.self_attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended: Tensor = attention.core_attention(query, key, value, documents)
        return attended

    def project(hidden: Tensor, angles: Tensor) -> Sequence[Tensor]:
        query, key, value = attention.get_query_key_value_tensors(layer.input_layernorm(hidden), None)[:3]
        groups = {"config": layer.config, "cp_group": attention.pg_collection.cp}
        return *(apply_rotary_pos_emb(each, angles, **groups) for each in (query, key)), value

    def add(hidden: Tensor, mixed: Tensor) -> Sequence[Tensor]:
        attended: Tensor = attention.linear_proj(mixed)[0]
        return layer.pre_mlp_layernorm.of_sum(attended, hidden)

    def finish(hidden: Tensor, mixed: Tensor) -> Sequence[Tensor]:
        total, normed = add(hidden, mixed)
        return (total + layer.mlp(normed)[0],)

    visit = swap.visit(hidden, layer)
    mixed = visit.whole(attend, *visit.by_token(project, hidden, angles))
    if not isinstance(layer.mlp, MoELayer):
        return visit.close(*visit.by_token(finish, hidden, mixed, again="mlp" in swap.again))
    mixture: Any = layer.mlp

    def route(normed: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(each.unflatten(0, normed.shape[:2]) for each in mixture.route(normed))

    def mix(total: Tensor, normed: Tensor, weights: Tensor, chosen: Tensor) -> Sequence[Tensor]:
        shared = mixture.shared_experts_compute(normed)
        rows, weights = mixture.preprocess(normed, weights.flatten(0, 1), chosen.flatten(0, 1))
        with nullcontext() if here is None else experts.computing_with(here):
            departed = mixture.dispatch(rows, weights)
        made, _ = mixture.routed_experts_compute(*departed)
        return (total + mixture.postprocess(mixture.combine(made), shared),)

    total, normed = visit.by_token(add, hidden, mixed)
    weights, chosen = visit.whole(route, normed)
    experts, here = mixture.experts, None
    if isinstance(experts, SparseExperts):
        weights, here = experts.enter(weights, chosen.sum((0, 1)))
        visit.beside(*here.weights)
    out = visit.close(*visit.by_token(mix, total, normed, weights, chosen, again="moe" in swap.again))
    return out if here is None else experts.leave(out, here)
