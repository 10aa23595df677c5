"""The oracle: a decoder-only transformer on one device, in plain PyTorch, in the precision that it is asked for.

Every engine and every layout is held against it. It is written to be read: one class a part, no fusion, no branches
for speed. Parts that a parallel engine computes otherwise (linears, the attention core, the experts, a row's mean) are
attributes of their own, so that a layout is applied from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.architecture import ModelArchitecture

AttentionCore = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(query [batch, heads, sequence, head_dim], key and value [batch, kv_heads, ...], documents) -> as query."""


@dataclass(frozen=True)
class Context:
    """What a layer needs to know of the tokens beside their hidden states; all [batch, sequence], int64."""

    positions: Tensor
    """Of each token within its document, from 0."""
    documents: Tensor | None = None
    """Index of each token's document within its row; a token attends to its own only. None: one document a row."""
    dispatch_groups: Tensor | None = None
    """Tokens of one number are dispatched together: an expert's capacity is that of their number. None: all of them.

    Only a model with a capacity factor looks at it. This is how dropping depends on a layout: each rank fills its own
    experts' places with the tokens it sees."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021), the head's first half paired with its second.

    x [batch, heads, sequence, head_dim], positions [batch, sequence]. Angles are taken in fp32 at least.
    """
    half = x.shape[-1] // 2
    precise = torch.promote_types(x.dtype, torch.float32)
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=precise) / half)
    angles = positions[:, None, :, None].to(precise) * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """Softmax attention of each token to itself and those before it in its document; grouped heads share a key."""
    if documents is None:
        mask = None
    else:
        sequence = documents.shape[1]
        before = torch.ones(sequence, sequence, dtype=torch.bool, device=documents.device).tril()
        mask = (before & (documents[:, :, None] == documents[:, None, :]))[:, None]
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
    )


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); the number of heads follows from the linears' width."""

    def __init__(self, model: ModelArchitecture) -> None:
        super().__init__()
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        self.query = nn.Linear(model.hidden, queries, bias=model.attention_bias)
        self.key = nn.Linear(model.hidden, keys, bias=model.attention_bias)
        self.value = nn.Linear(model.hidden, keys, bias=model.attention_bias)
        self.query_norm = RMSNorm(model.head_dim, model.norm_epsilon) if model.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(model.head_dim, model.norm_epsilon) if model.qk_norm else nn.Identity()
        self.output = nn.Linear(queries, model.hidden, bias=False)
        self.core: AttentionCore = causal_attention
        self.rotate: Callable[[Tensor, Tensor, float], Tensor] = rotate
        self._head_dim, self._theta = model.head_dim, model.rope_theta

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        mixed = self.core(*self.projected(hidden, context.positions), context.documents)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def projected(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [batch, heads, sequence, head_dim], key and value."""
        query = self.rotate(self.query_norm(self._heads(self.query(hidden))).transpose(1, 2), positions, self._theta)
        key = self.rotate(self.key_norm(self._heads(self.key(hidden))).transpose(1, 2), positions, self._theta)
        return query, key, self._heads(self.value(hidden)).transpose(1, 2)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self._head_dim))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False)
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class Routing:
    experts: Tensor
    """Chosen by each token, int64 [batch, sequence, top_k]."""
    weights: Tensor
    """Of the chosen, [batch, sequence, top_k]; 0 where an expert had no place left."""
    auxiliary: Tensor
    """Balancing and z-loss, already weighted, mean over rows, []."""


class Router(nn.Module):
    """Scores every expert, chooses the top k, and says what an unbalanced choice costs.

    Softmax over all logits, or over the chosen ones' (`router_normalize_top_k`: the same as normalising afterwards), or
    sigmoid (DeepSeek-V3, 2024). `bias` moves the choice but not the weights (loss-free balancing, Wang et al. 2024).
    In fp32 at least, whatever the model's precision.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, model: ModelArchitecture) -> None:
        super().__init__()
        self.model = model
        self.row_mean: Callable[[Tensor], Tensor] = partial(torch.mean, dim=1)
        self.weight = nn.Parameter(torch.empty(model.experts, model.hidden))
        if model.router_bias:
            self.register_buffer("bias", torch.zeros(model.experts))
            self.register_buffer("load", torch.zeros(model.experts), persistent=False)

    def forward(self, hidden: Tensor, groups: Tensor | None) -> Routing:
        model = self.model
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logits = functional.linear(hidden.to(precise), self.weight.to(precise))
        if model.router_score == "softmax":
            scores = share = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            share = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        experts = (scores + self.bias if model.router_bias else scores).topk(model.top_k).indices
        weights = scores.gather(-1, experts)
        if model.router_normalize_top_k:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if model.router_score == "sigmoid" else 0.0))
        weights = weights * model.router_scale
        if model.router_bias and self.training:
            self.load += torch.bincount(experts.flatten(), minlength=model.experts)
        if model.capacity_factor:
            weights = weights * self._has_place(experts, weights.detach(), groups)
        return Routing(experts, weights.to(hidden.dtype), self._auxiliary(logits, share))

    @torch.no_grad()
    def update_bias(self) -> None:
        """After a step: experts below the mean load become likelier by one rate, those above unlikelier."""
        self.bias += self.model.router_bias_rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()

    def _auxiliary(self, logits: Tensor, share: Tensor) -> Tensor:
        """aux_loss * experts * sum_e f_e P_e, in each row (DeepSeek-V2, 2024), and z_loss * mean(logsumexp^2).

        f_e: share of a row's choices that fall on e by score alone; P_e: mean share of e's score. (Fedus et al. 2022,
        with Zoph et al. 2022 for the z-loss.)
        """
        model = self.model
        chosen = torch.zeros_like(share).scatter(-1, share.topk(model.top_k).indices, 1.0)
        balance = model.experts * (self.row_mean(chosen) / model.top_k * self.row_mean(share)).sum(-1).mean()
        return model.aux_loss * balance + model.z_loss * logits.logsumexp(-1).square().mean()

    def _has_place(self, experts: Tensor, weights: Tensor, groups: Tensor | None) -> Tensor:
        """Whether each choice is among the ceil(tokens * top_k / experts * capacity_factor) that its expert takes.

        Tokens are counted, and places given, within each dispatch group: to the largest weights first, or to the
        earliest positions (of equal positions, to the earlier row).
        """
        model, batch = self.model, len(experts)
        # Sequence first, so that a token's number grows with its position.
        experts, weights = experts.transpose(0, 1).flatten(0, 1), weights.transpose(0, 1).flatten(0, 1)
        group_of = torch.zeros(len(experts), device=experts.device) if groups is None else groups.T.flatten()
        kept = torch.zeros_like(weights)
        for group in group_of.unique():
            capacity = math.ceil(int((group_of == group).sum()) * model.top_k / model.experts * model.capacity_factor)
            for expert in range(model.experts):
                token, choice = ((group_of == group)[:, None] & (experts == expert)).nonzero(as_tuple=True)
                if model.drop_order == "probs":
                    first = weights[token, choice].argsort(descending=True, stable=True)
                    token, choice = token[first], choice[first]
                kept[token[:capacity], choice[:capacity]] = 1
        return kept.unflatten(0, (-1, batch)).transpose(0, 1)


class Experts(nn.ModuleList):
    """The routed experts: each computes the tokens that chose it."""

    def __init__(self, model: ModelArchitecture) -> None:
        super().__init__(SwiGLU(model.hidden, model.expert_ffn) for _ in range(model.experts))

    def forward(self, hidden: Tensor, routing: Routing) -> Tensor:
        tokens = hidden.flatten(0, 1)
        chosen, weights = routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)
        mixed = torch.zeros_like(tokens)
        for index, expert in enumerate(self):
            token, choice = (chosen == index).nonzero(as_tuple=True)
            mixed = mixed.index_add(0, token, expert(tokens[token]) * weights[token, choice, None])
        return mixed.view_as(hidden)


class MoE(nn.Module):
    """Routed experts beside those that every token visits, whose output a sigmoid gate may weigh (Qwen2-MoE)."""

    def __init__(self, model: ModelArchitecture) -> None:
        super().__init__()
        self.router = Router(model)
        self.experts = Experts(model)
        self.shared = SwiGLU(model.hidden, model.shared_expert_ffn) if model.shared_expert_ffn else None
        self.shared_gate = nn.Linear(model.hidden, 1, bias=False) if model.shared_expert_gate else None

    def forward(self, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        routing = self.router(hidden, context.dispatch_groups)
        return self.mixed(hidden, routing), routing.auxiliary

    def mixed(self, hidden: Tensor, routing: Routing) -> Tensor:
        """What the experts make of tokens that are routed."""
        out = self.experts(hidden, routing)
        if self.shared is None:
            return out
        shared = self.shared(hidden)
        return out + (shared if self.shared_gate is None else self.shared_gate(hidden).sigmoid() * shared)


class Layer(nn.Module):
    """Attention, then a feed-forward block or experts, each normed before and added to the residual stream."""

    def __init__(self, model: ModelArchitecture, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.hidden, model.norm_epsilon)
        self.attention = Attention(model)
        self.ffn_norm = RMSNorm(model.hidden, model.norm_epsilon)
        if index < model.dense_layers:
            self.ffn = SwiGLU(model.hidden, model.ffn)
        else:
            self.moe = MoE(model)

    def forward(self, hidden: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Hidden states [batch, sequence, hidden] -> the same, and the auxiliary loss []."""
        hidden = hidden + self.attention(self.attention_norm(hidden), context)
        normed = self.ffn_norm(hidden)
        if hasattr(self, "ffn"):
            return hidden + self.ffn(normed), hidden.new_zeros(())
        routed, auxiliary = self.moe(normed, context)
        return hidden + routed, auxiliary


@dataclass(frozen=True)
class Output:
    logits: Tensor
    """[batch, sequence, vocab]."""
    auxiliary: Tensor
    """Sum over layers of their balancing and z-losses, mean over rows, []."""


class Decoder(nn.Module):
    """The whole model. Its `state_dict` has the names of `jobs.tensors`; weights are for the caller to set."""

    def __init__(self, model: ModelArchitecture) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab, model.hidden)
        self.layers = nn.ModuleList(Layer(model, index) for index in range(model.layers))
        self.norm = RMSNorm(model.hidden, model.norm_epsilon)
        self.head = None if model.tied_embeddings else nn.Linear(model.hidden, model.vocab, bias=False)

    def forward(self, tokens: Tensor, documents: Tensor | None = None, dispatch_groups: Tensor | None = None) -> Output:
        """Logits for int64 tokens [batch, sequence]; see Context for the other two."""
        context = Context(positions_of(tokens, documents), documents, dispatch_groups)
        hidden = self.embedding(tokens)
        total = hidden.new_zeros(())
        for layer in self.layers:
            hidden, auxiliary = layer(hidden, context)
            total = total + auxiliary
        head = self.embedding.weight if self.head is None else self.head.weight
        return Output(functional.linear(self.norm(hidden), head), total)


def positions_of(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """Each token's place in its document, [batch, sequence]; `documents` ascends along a row."""
    at = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if documents is None:
        return at
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return at - torch.where(begins, at, 0).cummax(1).values
