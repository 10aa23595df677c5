"""The head's loss by chunks beside torch's, in fp64."""

import pytest
import torch

from kernels import cross_entropy


def drawn(rows: int, width: int, vocab: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    labels = torch.randint(vocab, (rows,), generator=generator)
    return hidden, weight, labels, torch.rand(rows, generator=generator).round(decimals=1)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (7, 33), (12, 4100)])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_loss_and_gradients_are_those_of_fp64(rows, vocab, chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    hidden, weight, labels, counted = drawn(rows, 8, vocab)
    found = cross_entropy.linear_cross_entropy(hidden, weight, labels, counted)
    (found * 1.5).backward()
    precise = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    each = torch.nn.functional.cross_entropy(precise[0] @ precise[1].T, labels, reduction="none")
    expected = (each * counted.double()).sum()
    (expected * 1.5).backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), precise[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), precise[1].grad, rtol=1e-4, atol=1e-5)


def test_very_large_and_very_small_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]])
    labels, counted = torch.tensor([0, 2]), torch.ones(2)
    losses, gradient = cross_entropy.loss_and_gradient(logits.clone(), labels, counted)
    torch.testing.assert_close(losses, torch.tensor([1.0, 3.0]).log())
    expected = torch.tensor([[0.0, 0.0, 0.0], [1 / 3, 1 / 3, -2 / 3]])
    torch.testing.assert_close(gradient, expected)


def test_an_evaluation_makes_no_gradients():
    hidden, weight, labels, counted = drawn(4, 8, 9)
    with torch.no_grad():
        found = cross_entropy.linear_cross_entropy(hidden, weight, labels, counted)
    assert not found.requires_grad
    each = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(found, (each * counted).sum())
