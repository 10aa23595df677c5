"""The order of tokens by expert, and copies there and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.permute import cells, combine, divide_rows, join_rows, order_by_expert, permute, permute_weights


def choices(tokens: int, experts: int, top_k: int, skew: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, experts, generator=generator) - skew * torch.arange(experts)
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, scores.topk(top_k).indices, True)


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 33, 128, 300]),
    experts=st.sampled_from([1, 3, 8]),
    top_k=st.integers(1, 3),
    skew=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_rows_lie_by_expert_and_within_one_by_token(tokens, experts, top_k, skew, seed):
    top_k = min(top_k, experts)
    chosen = choices(tokens, experts, top_k, skew, seed)
    order = order_by_expert(chosen, top_k)
    expert, token = chosen.T.nonzero(as_tuple=True)
    assert order.token_of.tolist() == token.tolist()
    assert order.cell_of.tolist() == (token * experts + expert).tolist()
    assert order.counts.tolist() == chosen.sum(0).tolist()
    copies = torch.arange(tokens * top_k)
    assert torch.equal(order.token_of[order.row_of.long()].long(), torch.arange(tokens)[:, None].expand(-1, top_k))
    assert torch.equal(order.row_of.flatten().sort().values.long(), copies)


def test_there_and_back_and_their_gradients():
    chosen = choices(9, 4, 2, 1.0, 0)
    order = order_by_expert(chosen, 2)
    hidden, weights = torch.randn(9, 5, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    rows = permute(hidden, order)
    expert, token = chosen.T.nonzero(as_tuple=True)
    torch.testing.assert_close(rows, hidden[token])
    own = permute_weights(weights, order)
    torch.testing.assert_close(own, weights[token, expert])
    mixed = combine(rows * own[:, None], order)
    expected = torch.zeros_like(hidden).index_add(0, token, hidden[token] * weights[token, expert, None])
    torch.testing.assert_close(mixed, expected)
    grad = torch.randn(9, 5)
    ours = torch.autograd.grad(mixed, (hidden, weights), grad)
    theirs = torch.autograd.grad(expected, (hidden, weights), grad)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.filterwarnings("ignore:place rows of .* goes by plain torch")  # of 64 bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 1500])
def test_rows_go_apart_and_together_again(width, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, width, generator=generator).to(dtype).requires_grad_()
    row_of, sizes = torch.randperm(9, generator=generator).int(), [4, 0, 5]
    parts = divide_rows(rows, row_of, sizes)
    expected = rows[row_of.long()].split(sizes)
    grads = [torch.randn(size, width, generator=generator).to(dtype) for size in sizes]
    assert all(map(torch.equal, parts, expected))
    (ours,), (theirs,) = (torch.autograd.grad(made, rows, grads) for made in (parts, expected))
    assert torch.equal(ours, theirs)

    pieces = [part.detach().requires_grad_() for part in parts]
    assert torch.equal(join_rows(pieces, row_of), rows)
    for got, gradient in zip(torch.autograd.grad(join_rows(pieces, row_of), pieces, ours), grads, strict=True):
        assert torch.equal(got, gradient)


def test_each_row_has_its_own_weight_wherever_it_lies():
    weights, cell_of = torch.randn(7, requires_grad=True), torch.randperm(7).int()
    found, expected = cells(weights, cell_of), weights[cell_of.long()]
    assert torch.equal(found, expected)
    grad = torch.randn(7)
    assert torch.equal(*(torch.autograd.grad(each, weights, grad)[0] for each in (found, expected)))
