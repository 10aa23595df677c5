"""The router's choice in one pass beside plain torch in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.router import Rule, gate, plain_choice, route

rules = st.builds(
    Rule,
    score=st.sampled_from(["softmax", "sigmoid"]),
    top_k=st.integers(1, 4),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
)


@settings(max_examples=25, deadline=None)
@given(rule=rules, tokens=st.sampled_from([0, 1, 16, 21]), experts=st.sampled_from([4, 7, 16]), biased=st.booleans())
def test_choices_weights_and_gradients_are_those_of_fp64(rule, tokens, experts, biased):
    generator = torch.Generator().manual_seed(tokens + experts)
    logits = torch.randn(tokens, experts, generator=generator).mul(4).requires_grad_()
    bias = torch.randn(experts, generator=generator) if biased else None
    precise = logits.detach().double().requires_grad_()
    weights, chosen, counts = route(logits, rule, bias)
    expected, choice = plain_choice(precise, rule, None if bias is None else bias.double())
    assert torch.equal(chosen, choice)
    assert counts.tolist() == choice.sum(0).tolist()
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn(tokens, experts, generator=generator)
    weights.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(logits.grad.double(), precise.grad, rtol=1e-4, atol=1e-5)


def test_of_equals_the_first_is_chosen():
    _, chosen, _ = route(torch.zeros(3, 5), Rule("softmax", 2, normalize=True))
    assert chosen.tolist() == [[True, True, False, False, False]] * 3


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_of_what_is_not_chosen_do_not_count(score):
    logits = torch.randn(4, 6, requires_grad=True)
    weights, chosen, _ = route(logits, Rule(score, 2, normalize=True))
    weights.backward(torch.where(chosen, 1.5, torch.nan))
    assert logits.grad.isfinite().all()


def test_a_gate_is_a_product_in_fp32_whatever_it_is_given():
    hidden, weight = (torch.randn(shape).bfloat16().requires_grad_() for shape in ((9, 32), (4, 32)))
    logits = gate(hidden, weight)
    precise = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = precise[0] @ precise[1].T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(9, 4)
    logits.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip((hidden, weight), precise, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1e-3)
