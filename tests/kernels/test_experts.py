"""An expert MLP over runs: kernels beside fp64's plain torch, forward and backward, and what is kept between them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.experts import expert_mlp, plain_expert_mlp
from kernels.swiglu import plain_weighted_swiglu, swiglu, weighted_swiglu, weighted_swiglu_backward


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To fp32's rounding of the largest element, for sums of large numbers may come to small ones."""
    assert ours.shape == theirs.shape
    if ours.numel():
        assert (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


def drawn(counts: list[int], hidden: int, width: int, tail: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(counts) + hidden)
    rows, experts = sum(counts) + tail, len(counts)
    shapes = ((rows, hidden), (rows,), (experts, 2 * width, hidden), (experts, hidden, width))
    return [torch.randn(shape, generator=generator) for shape in shapes], torch.tensor(counts).cumsum(0).int()


def of(mlp, tensors: list[torch.Tensor], ends: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    rows, weights, gate_up, down = tensors
    out = mlp(rows, weights, ends, gate_up, down)
    out.backward(grad)
    return [out.detach(), *(tensor.grad for tensor in tensors)]


@settings(max_examples=8, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 32, 45]), min_size=1, max_size=4),
    hidden=st.sampled_from([32, 20]),
    width=st.sampled_from([16, 36]),
)
def test_an_expert_mlp_and_its_gradients_are_those_of_fp64(counts, hidden, width):
    tensors, ends = drawn(counts, hidden, width)
    grad = torch.randn(sum(counts), hidden, generator=torch.Generator().manual_seed(1))
    ours = of(expert_mlp, tensors, ends, grad)
    theirs = of(plain_expert_mlp, [tensor.double() for tensor in tensors], ends, grad.double())
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other)


def test_rows_of_nobody_may_be_nan():
    tensors, ends = drawn([3, 0, 34], 32, 16, tail=7)
    clean = [tensor.clone() for tensor in tensors]
    grad = torch.randn(44, 32)
    grad[37:] = 0
    for tensor in tensors[:2]:
        tensor[37:] = torch.nan
    ours = of(expert_mlp, tensors, ends, torch.where(torch.arange(44)[:, None] < 37, grad, torch.nan))
    theirs = of(plain_expert_mlp, [tensor.double() for tensor in clean], ends, grad.double())
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, other)


def test_the_plain_way_has_second_derivatives():
    (rows, weights, gate_up, down), ends = drawn([2, 0, 1], 4, 2)
    double = [tensor.double().requires_grad_() for tensor in (rows, weights, gate_up, down)]
    assert torch.autograd.gradgradcheck(lambda r, w, g, d: plain_expert_mlp(r, w, ends, g, d), double)


def test_of_what_lies_between_only_gate_and_up_are_kept():
    tensors, ends = drawn([40, 24], 32, 48)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        expert_mlp(tensors[0], tensors[1], ends, *tensors[2:])
    given_in = {tensor.data_ptr() for tensor in (*tensors, ends)}
    assert [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in given_in] == [(64, 96)]


@pytest.mark.parametrize("width", [16, 1030])
def test_a_weighted_swiglu_is_that_of_fp64(width):
    wide, weights, grad = torch.randn(5, 2 * width), torch.randn(5), torch.randn(5, width)
    out = weighted_swiglu(wide, weights)
    of_wide, of_weights, again = weighted_swiglu_backward(grad, wide, weights)
    precise, by = wide.double().requires_grad_(), weights.double().requires_grad_()
    expected = plain_weighted_swiglu(precise, by)
    expected.backward(grad.double())
    for ours, theirs in ((out, expected), (of_wide, precise.grad), (of_weights, by.grad)):
        assert_near(ours, theirs)
    torch.testing.assert_close(again, out)


def test_a_swiglu_without_weights_keeps_its_input_alone():
    wide = torch.randn(3, 2, 40, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = swiglu(wide)
    assert [tensor.data_ptr() for tensor in kept] == [wide.data_ptr()]
    precise = wide.detach().double().requires_grad_()
    gate, up = precise.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    grad = torch.randn(3, 2, 20)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide.grad.double(), precise.grad, rtol=1e-5, atol=1e-5)
