"""Attention over several ranks, and within documents, is attention over the whole sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import attention
from kernels.attention import attend, attend_backward, plain_attend, plain_attend_backward
from models.reference import causal_attention
from orchestrator.worker.ranks import Ranks
from parallel.context import gathered_attention, ring_attention, zigzag

BATCH, HEADS, KV_HEADS, SEQUENCE, WIDTH = 2, 4, 2, 16, 8
WAYS = {"gather": gathered_attention, "ring": ring_attention}

# Documents that begin and end within chunks and at their edges, one that spans all, and single tokens.
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 5 + [2] + [4] * 7, [7] * 16])


def drawn(precision: torch.dtype) -> list[Tensor]:
    """Query, key, value, and the gradient of the output, of the whole sequence."""
    draw = torch.Generator().manual_seed(1)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(BATCH, n, SEQUENCE, WIDTH, generator=draw, dtype=torch.float64).to(precision) for n in heads]


def computed(core: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Output, and gradients of query, key and value."""
    *inputs, grad = (tensor.clone().requires_grad_() for tensor in tensors)
    out = core(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@dataclass(frozen=True)
class Parts:
    way: str
    documents: Tensor | None
    precision: torch.dtype

    def __call__(self, rank: int) -> list[np.ndarray]:
        places = zigzag(SEQUENCE, dist.get_world_size(), rank)
        found = computed(
            lambda *inputs: WAYS[self.way](*inputs, dist.group.WORLD, self.documents, WIDTH**-0.5),
            [tensor[:, :, places] for tensor in drawn(self.precision)],
        )
        return [part.double().numpy() for part in found]


def _call(rank: int, cases: list[Parts]) -> list[list[np.ndarray]]:
    return [case(rank) for case in cases]


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_attention_over_ranks_is_attention_over_the_sequence(ranks: Ranks, cp: int) -> None:
    tolerances = ((torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 0.05))
    cases = [
        (Parts(way, documents, precision), tolerance)
        for way, documents, (precision, tolerance) in product(WAYS, (None, DOCUMENTS), tolerances)
    ]
    accounts = ranks.run(cp, _call, [case for case, _ in cases])
    for index, (case, tolerance) in enumerate(cases):
        expected = computed(lambda *inputs: causal_attention(*inputs, case.documents), drawn(torch.float64))  # noqa: B023
        for rank, account in enumerate(accounts):
            for part, whole in zip(account[index], expected, strict=True):
                held = whole[:, :, zigzag(SEQUENCE, cp, rank)]
                np.testing.assert_allclose(part, held, rtol=0, atol=tolerance, err_msg=f"{case} on {rank}")


def test_zigzag_gives_every_rank_the_same_number_of_earlier_tokens() -> None:
    for cp in (1, 2, 3, 4):
        held = [zigzag(24, cp, rank) for rank in range(cp)]
        assert sorted(np.concatenate(held)) == list(range(24))
        assert len({int(places.sum()) for places in held}) == 1
    assert list(zigzag(8, 2, 1)) == [2, 3, 4, 5]


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 0.03)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS, ids=["fp32", "bf16"])
def test_results_over_two_sets_of_keys_merge(device: str, precision: torch.dtype, tolerance: float) -> None:
    """The fused kernels of this device and the plain one, forward and backward, against all keys at once in fp64."""
    query, key, value, grad = drawn(torch.float64)
    key, value = (torch.cat((tensor, tensor.flip(2) * 0.7), dim=2) for tensor in (key, value))
    scale = 1 / math.sqrt(WIDTH)
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    mask = torch.cat((torch.ones(SEQUENCE, SEQUENCE).tril(), torch.ones(SEQUENCE, SEQUENCE)), dim=1).bool()
    whole = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
    expected = torch.autograd.grad(whole, inputs, grad)
    query, key, value, grad = (tensor.to(device, precision) for tensor in (query, key, value, grad))
    halves = [(slice(0, SEQUENCE), True), (slice(SEQUENCE, None), False)]
    for forward, backward in ((attend, attend_backward), (plain_attend, plain_attend_backward)):
        found = [forward(query, key[:, :, at], value[:, :, at], scale, causal=causal) for at, causal in halves]
        lse = torch.logaddexp(found[0][1], found[1][1])
        out = sum(part * (its - lse).exp()[..., None] for part, its in found).to(precision)
        torch.testing.assert_close(out.double().cpu(), whole.detach(), rtol=0, atol=tolerance)
        parts = [
            backward(grad, query, key[:, :, at], value[:, :, at], out, lse, scale, causal=causal)
            for at, causal in halves
        ]
        grads = [parts[0][0] + parts[1][0]]
        grads += [torch.cat((parts[0][index], parts[1][index]), dim=2) for index in (1, 2)]
        for one, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(one.double().cpu(), other, rtol=0, atol=3 * tolerance)


def test_plain_attention_is_the_same_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, grad = drawn(torch.float64)
    at_once = plain_attend(query, key, value, 0.3, causal=True)
    gradients = plain_attend_backward(grad, query, key, value, *at_once, 0.3, causal=True)
    monkeypatch.setattr(attention, "TILE_ELEMENTS", 5 * BATCH * HEADS * SEQUENCE)
    torch.testing.assert_close(plain_attend(query, key, value, 0.3, causal=True), at_once)
    torch.testing.assert_close(plain_attend_backward(grad, query, key, value, *at_once, 0.3, causal=True), gradients)
