"""A router's choice of experts and what their outputs weigh, from its logits in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.choice import jit, tl, triton, triton_takes


@dataclass(frozen=True)
class Rule:
    """How scores become a choice and weights."""

    score: Literal["softmax", "sigmoid"]
    top_k: int
    normalize: bool
    """Whether a token's weights are made to sum to `scale`."""
    scale: float = 1.0


EPSILON = 1e-20
"""Added to a sum of sigmoids, which may all be 0 (DeepSeek-V3, 2024); one of softmax cannot be."""


def gate(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [tokens, width] @ weight [experts, width].T in fp32 at least -> logits [tokens, experts]."""
    logits: Tensor = _Gate.apply(hidden, weight)
    return logits


class _Gate(torch.autograd.Function):
    """On a GPU of 16-bit numbers, whose products it adds up in fp32 anyway; nothing is copied into fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        if _is_half(hidden) and hidden.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(precise) @ weight.to(precise).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        if _is_half(hidden) and hidden.is_cuda:
            # The gradient in two numbers of the weights' precision, which together have twice its digits.
            high = grad.to(hidden.dtype)
            both = torch.cat((high, (grad - high).to(hidden.dtype)), 1)
            of_weight = torch.mm(both.T, hidden, out_dtype=torch.float32).unflatten(0, (2, -1)).sum(0)
            return torch.mm(both, torch.cat((weight, weight))), of_weight.to(weight.dtype)
        of_hidden, of_weight = grad @ weight.to(grad.dtype), grad.T @ hidden.to(grad.dtype)
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def route(logits: Tensor, rule: Rule, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 logits [tokens, experts] -> weights (0 where not chosen), which are chosen (bool), and their counts.

    weights and chosen [tokens, experts]; counts int32 [experts]. `bias` [experts] moves the choice but not the weights
    (loss-free balancing, Wang et al. 2024). Of equal scores the first expert's comes first. Weights are differentiable.
    """
    weights, chosen = _Route.apply(logits, rule, bias)
    return weights, chosen, chosen.sum(0, dtype=torch.int32)


def plain_choice(logits: Tensor, rule: Rule, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and choices in plain torch, differentiable any number of times."""
    scores = logits.softmax(-1) if rule.score == "softmax" else logits.sigmoid()
    # A stable sort, for topk may take any of equals.
    order = (scores if bias is None else scores + bias).detach().sort(dim=-1, descending=True, stable=True).indices
    experts = order[..., : rule.top_k]
    weights = scores.gather(-1, experts)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (EPSILON if rule.score == "sigmoid" else 0.0))
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, experts, True)
    return torch.zeros_like(scores).scatter(-1, experts, weights * rule.scale), chosen


def plain_choice_backward(grad: Tensor, logits: Tensor, chosen: Tensor, rule: Rule) -> Tensor:
    """Gradient of the logits, from that of the weights [tokens, experts]."""
    scores = logits.softmax(-1) if rule.score == "softmax" else logits.sigmoid()
    of_weights = torch.where(chosen, grad, 0.0) * rule.scale
    of_scores = of_weights
    if rule.normalize:
        taken = torch.where(chosen, scores, 0.0)
        total = taken.sum(-1, keepdim=True) + (EPSILON if rule.score == "sigmoid" else 0.0)
        mean = (of_weights * taken).sum(-1, keepdim=True) / total
        of_scores = torch.where(chosen, of_weights - mean, 0.0) / total
    if rule.score == "sigmoid":
        return of_scores * scores * (1 - scores)
    return scores * (of_scores - (of_scores * scores).sum(-1, keepdim=True))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rule: Rule, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.rule = rule
        if triton_takes("router", _reason(logits), logits):
            logits = logits.contiguous()
            weights, chosen = torch.empty_like(logits), torch.empty_like(logits, dtype=torch.bool)
            if len(logits):
                _forward_kernel[_grid(logits)](
                    logits,
                    bias,
                    weights,
                    chosen,
                    *logits.shape,
                    rule.scale,
                    **_options(logits, rule),
                    BIASED=bias is not None,
                )
        else:
            weights, chosen = plain_choice(logits, rule, bias)
        ctx.save_for_backward(logits, chosen)
        ctx.mark_non_differentiable(chosen)
        return weights, chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        logits, chosen = ctx.saved_tensors
        rule: Rule = ctx.rule
        if not triton_takes("router", _reason(logits), logits):
            return plain_choice_backward(grad, logits, chosen, rule), None, None
        of_logits = torch.empty_like(logits)
        if len(logits):
            _backward_kernel[_grid(logits)](
                grad.contiguous(), logits, chosen, of_logits, *logits.shape, rule.scale, **_options(logits, rule)
            )
        return of_logits, None, None


_TOKENS = 16


def _reason(logits: Tensor) -> str | None:
    if logits.dtype != torch.float32:
        return "the kernel takes fp32"
    return None if logits.shape[-1] <= 1024 else "the kernel holds 1,024 experts"


def _grid(logits: Tensor) -> tuple[int]:
    return (triton.cdiv(len(logits), _TOKENS),)


def _options(logits: Tensor, rule: Rule) -> dict[str, Any]:
    return {
        "SOFTMAX": rule.score == "softmax",
        "NORMALIZE": rule.normalize,
        "TOP_K": rule.top_k,
        "TOKENS": _TOKENS,
        "PADDED": max(2, triton.next_power_of_2(logits.shape[1])),
    }


@jit
def _block(tokens, experts, TOKENS: tl.constexpr, PADDED: tl.constexpr):
    """Of a program: its tokens, all experts, which pairs there are, and where they lie."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, PADDED)
    inside = (token < tokens)[:, None] & (expert < experts)[None, :]
    return token, expert, inside, token[:, None] * experts + expert[None, :]


@jit
def _scores(logits, place, inside, SOFTMAX: tl.constexpr):
    """[TOKENS, PADDED], 0 outside."""
    if SOFTMAX:
        logit = tl.load(logits + place, mask=inside, other=-float("inf"))
        # A row beyond the last token's has nothing but -inf.
        top = tl.maximum(tl.max(logit, 1), -1e30)
        power = tl.where(inside, tl.exp(logit - top[:, None]), 0.0)
        total = tl.sum(power, 1)
        return power / tl.where(total > 0, total, 1.0)[:, None]
    return tl.where(inside, tl.sigmoid(tl.load(logits + place, mask=inside, other=0.0)), 0.0)


@jit
def _forward_kernel(
    logits,
    bias,
    weights,
    chosen,
    tokens,
    experts,
    scale,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
    BIASED: tl.constexpr,
):
    token, expert, inside, place = _block(tokens, experts, TOKENS, PADDED)
    scores = _scores(logits, place, inside, SOFTMAX)
    rank = scores
    if BIASED:
        rank += tl.load(bias + expert, mask=expert < experts, other=0.0)[None, :]
    rank = tl.where((expert < experts)[None, :], rank, -float("inf"))
    taken = tl.zeros((TOKENS, PADDED), tl.int32)
    for _ in tl.static_range(TOP_K):
        best = tl.argmax(rank, 1, tie_break_left=True)
        here = expert[None, :] == best[:, None]
        taken += here.to(tl.int32)
        rank = tl.where(here, -float("inf"), rank)
    weight = tl.where(taken > 0, scores, 0.0)
    if NORMALIZE:
        total = tl.sum(weight, 1)
        if not SOFTMAX:
            total += 1e-20
        weight = weight / tl.where(token < tokens, total, 1.0)[:, None]
    tl.store(weights + place, weight * scale, mask=inside)
    tl.store(chosen + place, taken > 0, mask=inside)


@jit
def _backward_kernel(
    grad,
    logits,
    chosen,
    of_logits,
    tokens,
    experts,
    scale,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
):
    token, _, inside, place = _block(tokens, experts, TOKENS, PADDED)
    scores = _scores(logits, place, inside, SOFTMAX)
    taken = tl.load(chosen + place, mask=inside, other=0) > 0
    # What is not chosen has weight 0 whatever its score; its gradient may be anything.
    of_scores = tl.where(taken, tl.load(grad + place, mask=inside, other=0.0), 0.0) * scale
    if NORMALIZE:
        weight = tl.where(taken, scores, 0.0)
        total = tl.sum(weight, 1)
        if not SOFTMAX:
            total += 1e-20
        total = tl.where(token < tokens, total, 1.0)
        mean = tl.sum(of_scores * weight, 1) / total
        of_scores = tl.where(taken, of_scores - mean[:, None], 0.0) / total[:, None]
    if SOFTMAX:
        of_logit = scores * (of_scores - tl.sum(of_scores * scores, 1)[:, None])
    else:
        of_logit = of_scores * scores * (1 - scores)
    tl.store(of_logits + place, of_logit, mask=inside)
