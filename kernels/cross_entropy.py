"""Cross-entropy of an output projection whose logits are never all there: rows by chunks, gradients made on the way.

A chunk's logits become their own gradient in place and are gone before the next chunk's are made (as in Liger Kernel,
Hsu et al. 2024); a backward pass has nothing left to do but to multiply by what it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.choice import jit, tl, triton_takes
from kernels.rehearsal import stands_for

CHUNK_ELEMENTS = 1 << 27
"""Logits at once: 256 MiB in 16 bits."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Sum over rows of `counted` times -log softmax(hidden @ weight.T)[label], [] in fp32 at least.

    hidden [rows, width]; weight [vocab, width]; labels int64 [rows]; counted [rows], what each row's loss counts.
    Holds CHUNK_ELEMENTS logits at once, and the gradients of hidden and weight from the forward pass on.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, counted)
    return total


def loss_and_gradient(logits: Tensor, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [rows] in fp32 at least, times `counted`, and the gradient of their sum, which may lie in `logits`."""
    reason = None if logits.element_size() <= 4 else "the kernel takes 16 and 32 bits"
    if not triton_takes("cross-entropy", reason, logits):
        return plain_loss_and_gradient(logits, labels, counted)
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _kernel[(rows,)](logits, labels, counted, losses, vocab, COLUMNS=4096, num_warps=8)
    return losses, logits


def plain_loss_and_gradient(logits: Tensor, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """`loss_and_gradient` in plain torch."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_shares = precise.log_softmax(-1)
    losses = -log_shares.gather(1, labels[:, None])[:, 0] * counted
    gradient = log_shares.exp()
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return losses, (gradient * counted[:, None]).to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden.device)
        wants = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if wants[0] else None
        of_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device) if wants[1] else None
        chunks = max(1, -(-stands_for(len(hidden)) * len(weight) // CHUNK_ELEMENTS))
        for rows in torch.arange(len(hidden)).tensor_split(chunks):
            run = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0)
            losses, gradient = loss_and_gradient(hidden[run] @ weight.T, labels[run], counted[run])
            total += losses.sum()
            if of_hidden is not None:
                torch.mm(gradient, weight, out=of_hidden[run])
            if of_weight is not None:
                _add_product(of_weight, gradient.T, hidden[run])
        ctx.save_for_backward(of_hidden, None if of_weight is None else of_weight.to(weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = (None if held is None else held * grad.to(held.dtype) for held in ctx.saved_tensors)
        return of_hidden, of_weight, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total may be the more precise; a device adds within the product."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left.to(total.dtype) @ right.to(total.dtype)


@jit
def _kernel(logits, labels, counted, losses, vocab, COLUMNS: tl.constexpr):
    """A program a row: its largest logit and sum in one pass (online softmax), its gradient in place in another."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * vocab
    top = tl.full((COLUMNS,), -1e30, tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, vocab, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        logit = tl.load(start + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, logit)
        total = total * tl.exp(top - higher) + tl.exp(logit - higher)
        top = higher
    highest = tl.max(top)
    whole = tl.sum(total * tl.exp(top - highest))
    label = tl.load(labels + row)
    counts = tl.load(counted + row).to(tl.float32)
    right = tl.load(start + label).to(tl.float32)
    tl.store(losses + row, (tl.log(whole) + (highest - right)) * counts)
    scale = counts / whole
    for first in range(0, vocab, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        logit = tl.load(start + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(logit - highest) * scale
        gradient = tl.where(column == label, gradient - counts, gradient)
        tl.store(start + column, gradient.to(logits.dtype.element_ty), mask=column < vocab)
