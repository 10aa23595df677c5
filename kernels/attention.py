"""Attention of some queries to some keys, with the log-sum-exp that lets results over several sets of keys be merged.

Fused kernels that torch brings where they take the tensors (any precision on a CPU, 16 bits on CUDA), else plain
arithmetic a tile of queries at a time. No kernel here is given a mask, so none falls back to holding the whole score
matrix. On an H200, 2 x 4,096 tokens of 32 heads, cuDNN's was seen to do 547 TFLOP/s forward and 437 backward where
FlashAttention 2 did 303 and 247 (torch 2.11).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.choice import triton_runs
from kernels.query_gradient import query_gradient

TILE_ELEMENTS = 1 << 26
"""Scores that the plain way holds at once: 256 MiB in fp32."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`attend` of a whole sequence to itself, differentiable, without the log-sum-exp."""
    if _cudnn_takes(query, key):
        out: Tensor = _CausalAttention.apply(query, key, value, scale)
        return out
    grouped = query.shape[1] != key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
    )


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, lse = attend(query, key, value, scale, causal=True)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        return *attend_backward(grad, query, key, value, out, lse, ctx.scale, causal=True), None


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention and the logarithm of its denominator.

    query [batch, heads, queries, head_dim]; key and value [batch, kv_heads, keys, head_dim], head i reading key head
    i // (heads // kv_heads). `causal` wants as many keys as queries: each query sees its own key and those before.
    Gives out [batch, heads, queries, head_dim] in the query's precision, and lse [batch, heads, queries] in fp32 at
    least.
    """
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
        return out, lse
    if _cudnn_takes(query, key):
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
        )
        return found[0], found[1].squeeze(-1)
    if _flash_takes(query):
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return found[0], found[1]
    return plain_attend(query, key, value, scale, causal=causal)


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, of their shapes, from `grad`, that of `out`.

    `out` and `lse` may be those of more keys than are given here: exp(score - lse) is then the share that these keys
    have in the whole, and what comes back is their part of the gradients (FlashAttention-2, Dao 2023, section 3.1).
    """
    if query.device.type == "cpu":
        return tuple(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, query, key, value, out, lse, 0.0, causal, scale=scale
            )
        )
    if 0 in grad.stride() or grad.stride(-1) != 1:
        grad = grad.contiguous()
    # Without dropout there is no random state to give back.
    if _cudnn_takes(query, key):
        state = torch.empty((), dtype=torch.int64, device=query.device)
        lengths = query.shape[2], key.shape[2]
        of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad,
            query,
            key,
            value,
            out,
            lse[..., None].contiguous(),
            state,
            state,
            None,
            None,
            None,
            *lengths,
            0.0,
            causal,
            scale=scale,
        )
        if torch.are_deterministic_algorithms_enabled():
            of_query = query_gradient(grad, query, key, value, out, lse, scale, causal=causal)
        return of_query, of_key, of_value
    if _flash_takes(query):
        state = torch.empty(2, dtype=torch.uint64, device=query.device)
        return tuple(
            torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad,
                query,
                key,
                value,
                out,
                lse,
                None,
                None,
                query.shape[2],
                key.shape[2],
                0.0,
                causal,
                state,
                state,
                scale=scale,
            )
        )
    return plain_attend_backward(grad, query, key, value, out, lse, scale, causal=causal)


def _cudnn_takes(query: Tensor, key: Tensor) -> bool:
    """On Hopper and later. It makes a plan for each new length: not for documents."""
    width = query.shape[-1]
    if torch.are_deterministic_algorithms_enabled() and (width & (width - 1) or not triton_runs(query)):
        return False  # what query_gradient does not take
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= 128
        and query.shape[2] % 128 == 0
        and key.shape[2] % 128 == 0
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(query.device) >= (9, 0)
    )


def _flash_takes(query: Tensor) -> bool:
    width = query.shape[-1]
    return query.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256


def plain_attend(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """`attend` in plain torch."""
    grouped, key, value = _grouped(query, key), _precise(key)[:, :, None], _precise(value)[:, :, None]
    out, lse = torch.empty_like(grouped), grouped.new_empty(grouped.shape[:-1])
    for rows in _tiles(query, key):
        scores = _scores(grouped, key, scale, rows, causal)
        lse[..., rows] = scores.logsumexp(-1)
        out[..., rows, :] = (scores - lse[..., rows, None]).exp() @ value
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def plain_attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` in plain torch."""
    grouped, of_out = _grouped(query, key), _grouped(grad, key)
    wide_key, wide_value = _precise(key)[:, :, None], _precise(value)[:, :, None]
    lse = lse.unflatten(1, (key.shape[1], -1))[..., None]
    balance = (of_out * _grouped(out, key)).sum(-1, keepdim=True)
    of_query = torch.empty_like(grouped)
    of_key, of_value = torch.zeros_like(wide_key[:, :, 0]), torch.zeros_like(wide_value[:, :, 0])
    for rows in _tiles(query, wide_key):
        share = (_scores(grouped, wide_key, scale, rows, causal) - lse[..., rows, :]).exp()
        of_scores = share * (of_out[..., rows, :] @ wide_value.mT - balance[..., rows, :]) * scale
        of_query[..., rows, :] = of_scores @ wide_key
        of_key += (of_scores.mT @ grouped[..., rows, :]).sum(2)
        of_value += (share.mT @ of_out[..., rows, :]).sum(2)
    return of_query.flatten(1, 2).to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _grouped(heads: Tensor, key: Tensor) -> Tensor:
    """[batch, heads, ...] -> [batch, kv_heads, heads that share a key head, ...], in fp32 at least."""
    return _precise(heads).unflatten(1, (key.shape[1], -1))


def _tiles(query: Tensor, key: Tensor) -> list[slice]:
    """Runs of queries whose scores are at most TILE_ELEMENTS, or one query's."""
    batch, heads, queries, _ = query.shape
    length = max(1, TILE_ELEMENTS // (batch * heads * key.shape[-2]))
    return [slice(start, min(start + length, queries)) for start in range(0, queries, length)]


def _scores(grouped: Tensor, key: Tensor, scale: float, rows: slice, causal: bool) -> Tensor:
    """[batch, kv_heads, shared, rows, keys]."""
    scores = grouped[..., rows, :] @ key.mT * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(rows.start + 1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores
