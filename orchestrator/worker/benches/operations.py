"""The operations around expert MLPs, forward and backward, on 8,192 tokens: this project's kernels and what else is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention import causal_attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.permute import combine, order_by_expert, permute
from kernels.rms_norm import add_rms_norm, plain_add_rms_norm
from kernels.rope import plain_rotate, rotate
from kernels.router import Rule, plain_choice, route
from kernels.swiglu import plain_weighted_swiglu, swiglu
from orchestrator.worker.benches.measure import Call, side_by_side

TOKENS, HIDDEN, HEADS, KEY_HEADS, WIDTH, VOCAB, EXPERTS, TOP_K = 8192, 4096, 32, 8, 14_336, 32_000, 64, 8
SEQUENCES = 2
SMALLER = 32
"""What a CPU's sizes are divided by."""


def measure(device: torch.device, rounds: int) -> dict[str, dict[str, dict[str, Any]]]:
    """By operation, by way: seconds, or why it failed."""
    scale, dtype = (1, torch.bfloat16) if device.type == "cuda" else (SMALLER, torch.float32)
    found = {}
    for name, ways in _operations(device, dtype, scale).items():
        working, results = {}, {}
        for way, call in ways.items():
            try:
                call()
                working[way] = call
            except (ImportError, RuntimeError, TypeError) as error:  # packages may be missing, or be of other releases
                results[way] = {"failed": str(error).splitlines()[0]}
        timed = side_by_side(working, device, rounds)
        found[name] = results | {way: {"seconds": vars(each)} for way, each in timed.items()}
    return found


def _operations(device: torch.device, dtype: torch.dtype, scale: int) -> dict[str, Mapping[str, Call]]:
    tokens, hidden, width, vocab = TOKENS // scale, HIDDEN // scale, WIDTH // scale, VOCAB // scale
    heads, kv_heads = max(4, HEADS // scale), max(1, KEY_HEADS // scale)

    def drawn(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=of).requires_grad_()

    logits, rule = drawn(tokens, EXPERTS, of=torch.float32), Rule("softmax", TOP_K, normalize=True)
    chosen = torch.zeros(tokens, EXPERTS, dtype=torch.bool, device=device)
    chosen.scatter_(1, logits.detach().topk(TOP_K).indices, True)
    order = order_by_expert(chosen, TOP_K)
    x, wide = drawn(tokens, hidden), drawn(tokens, 2 * width)
    weight = drawn(vocab, hidden)
    labels, counted = torch.randint(vocab, (tokens,), device=device), torch.ones(tokens, device=device)
    query = drawn(tokens // SEQUENCES, SEQUENCES, heads, 128)
    half = torch.rand(tokens // SEQUENCES, 1, 1, 64, device=device)
    angles = torch.cat((half, half), -1)
    turned = drawn(SEQUENCES, heads, tokens // SEQUENCES, 128)
    key, value = (drawn(SEQUENCES, kv_heads, tokens // SEQUENCES, 128) for _ in range(2))

    def by_index(hidden: Tensor) -> Tensor:
        rows = hidden[order.token_of]
        return torch.zeros_like(hidden).index_add(0, order.token_of, rows)

    def by_liger(*given: Tensor) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        found = LigerFusedLinearCrossEntropyFunction.apply(*given)
        return found[0] if isinstance(found, tuple) else found

    def liger_swiglu(wide: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(*(part.contiguous() for part in wide.chunk(2, -1)))

    def plain_loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=128**-0.5, enable_gqa=heads != kv_heads
        )

    def silu_and_product(wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, -1)
        return functional.silu(gate) * up

    def liger_norm(*given: Tensor) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        normed, total = LigerFusedAddRMSNormFunction.apply(*given, 1e-5, 0.0, "llama", False)
        return total, normed

    return {
        "router": {
            "fivefold": _both(lambda given: route(given, rule)[0], logits),
            "torch": _both(lambda given: plain_choice(given, rule, None)[0], logits),
        },
        "order by expert": {
            "fivefold": lambda: order_by_expert(chosen, TOP_K),
            "torch": lambda: chosen.T.nonzero(),
        },
        "permute and combine": {
            "fivefold": _both(lambda given: combine(permute(given, order), order), x),
            "torch, by atomics": _both(by_index, x),
        },
        "rotary embedding": {
            "fivefold": _both(lambda given: rotate(given, angles), query),
            "torch": _both(lambda given: plain_rotate(given, angles), query),
        },
        "sum and norm": {
            "fivefold": _both(lambda *given: add_rms_norm(*given, 1e-5), x, drawn(tokens, hidden), drawn(hidden)),
            "torch": _both(lambda *given: plain_add_rms_norm(*given, 1e-5), x, drawn(tokens, hidden), drawn(hidden)),
            "liger": _both(liger_norm, x, drawn(tokens, hidden), drawn(hidden)),
        },
        "SwiGLU": {
            "fivefold": _both(swiglu, wide),
            "torch": _both(silu_and_product, wide),
            "torch, in fp32": _both(lambda given: plain_weighted_swiglu(given, None), wide),
            "liger": _both(liger_swiglu, wide),
        },
        "head and cross-entropy": {
            "fivefold": _both(lambda *given: linear_cross_entropy(*given, labels, counted), x, weight),
            "torch": _both(plain_loss, x, weight),
            "liger": _both(lambda *given: by_liger(*given, labels), x, weight),
        },
        "causal attention": {
            "fivefold": _both(lambda *given: causal_attention(*given, 128**-0.5), turned, key, value),
            "torch": _both(attention, turned, key, value),
        },
    }


def _both(function: Callable[..., Tensor | tuple[Tensor, ...]], *given: Tensor) -> Call:
    """Forward and backward; the results' gradients are drawn at the first call."""
    grads: list[Tensor] = []

    def call() -> None:
        made = function(*given)
        results = made if isinstance(made, tuple) else (made,)
        if not grads:
            grads.extend(torch.ones_like(out) if out.dim() == 0 else torch.randn_like(out) for out in results)
        torch.autograd.grad(results, given, grads)

    return call
