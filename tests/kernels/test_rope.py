"""Rotary embedding in one pass beside plain torch in fp64, of heads that lie as a split of one tensor leaves them."""

import pytest
import torch

from kernels.rope import plain_rotate, rotate


@pytest.mark.filterwarnings("ignore:rotary embedding of .* half a head is no power of 2")
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("count", "width"), [(3, 8), (20, 4), (2, 12)])
def test_a_turn_and_its_gradient_are_those_of_fp64(rows, count, width):
    packed = torch.randn(5, 2, count + 4, width)
    heads = packed[:, :, 2 : 2 + count].requires_grad_()
    half = torch.rand(5, rows, 1, width // 2) * 1000
    angles = torch.cat((half, half), -1)
    precise = heads.detach().double().requires_grad_()
    found, expected = rotate(heads, angles), plain_rotate(precise, angles.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(2, 5, count, width).transpose(0, 1)
    (ours,), (theirs,) = torch.autograd.grad(found, heads, grad), torch.autograd.grad(expected, precise, grad.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(found, -angles), heads, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:rotary embedding of .* the kernel takes 16 and 32 bits")
def test_it_may_be_differentiated_twice():
    heads = torch.randn(2, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    half = torch.rand(2, 1, 1, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, torch.cat((half, half), -1)) ** 2, (heads,))
