"""SwiGLU experts over runs of rows: two grouped products and what lies between, of which only gate and up are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.grouped_gemm import input_gradient, linear, weight_gradient
from kernels.swiglu import plain_weighted_swiglu, weighted_swiglu, weighted_swiglu_backward


def expert_mlp(rows: Tensor, weights: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What each row's expert makes of it, times its weight: down @ (silu(gate @ row) * (up @ row)) * weight.

    rows [n, hidden] by expert, see `kernels.grouped_gemm`; weights [n] of the router; ends [experts];
    gate_up [experts, 2 * width, hidden], gate first; down [experts, hidden, width]. Gives [n, hidden].

    Kept for backward: rows, and 2 * width elements a row; the activation and the product with the weight are made
    again (as in SonicMoE, Guo et al. 2025), in the pass that computes the gradients of gate and up.
    """
    made: Tensor = _ExpertMLP.apply(rows, weights, ends, gate_up, down)
    return made


def plain_expert_mlp(rows: Tensor, weights: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`expert_mlp` in plain torch, differentiable any number of times."""
    out = []
    for run, wide, narrow in zip(rows.split(_counts(rows, ends)), gate_up, down, strict=False):
        start = sum(map(len, out))
        active = plain_weighted_swiglu(run @ wide.T, weights[start : start + len(run)])
        out.append(active @ narrow.T)
    return torch.cat((*out, rows.new_zeros(len(rows) - sum(map(len, out)), down.shape[1])))


def _counts(rows: Tensor, ends: Tensor) -> list[int]:
    last = ends.tolist()
    counts = [end - begin for begin, end in zip([0, *last], last, strict=False)]
    return [*counts, len(rows) - sum(counts)]


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        wide = linear(rows, gate_up, ends)
        ctx.save_for_backward(rows, weights, ends, gate_up, down, wide)
        return linear(weighted_swiglu(wide, weights), down, ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, ends, gate_up, down, wide = ctx.saved_tensors
        of_wide, of_weights, active = weighted_swiglu_backward(input_gradient(grad, down, ends), wide, weights)
        of_down = weight_gradient(grad, active, ends) if ctx.needs_input_grad[4] else None
        of_gate_up = weight_gradient(of_wide, rows, ends) if ctx.needs_input_grad[3] else None
        of_rows = input_gradient(of_wide, gate_up, ends) if ctx.needs_input_grad[0] else None
        return of_rows, of_weights.to(weights.dtype), None, of_gate_up, of_down
