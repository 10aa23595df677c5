"""A norm of a sum in one pass beside plain torch in fp64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rms_norm import add_rms_norm, plain_add_rms_norm, rms_norm

EPSILON = 1e-5


def results(norm, given: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    given = [tensor.clone().requires_grad_() for tensor in given]
    made = norm(*given, EPSILON)
    made = (made,) if isinstance(made, torch.Tensor) else made
    return [*made, *torch.autograd.grad(made, given, grads[-len(made) :])]


@settings(max_examples=12, deadline=None)
@given(rows=st.sampled_from([0, 1, 5, 40]), width=st.sampled_from([1, 8, 20, 130]), adds=st.booleans())
def test_a_norm_of_a_sum_and_its_gradients_are_those_of_fp64(rows, width, adds):
    generator = torch.Generator().manual_seed(rows + width)
    x, residual, first, second = (torch.randn(rows, 2, width, generator=generator) for _ in range(4))
    # What lies otherwise than its shape says is read by its shape, gradients too.
    x, grads = x.transpose(0, 1), [first.transpose(0, 1), second.transpose(0, 1)]
    weight = torch.randn(width, generator=generator)
    given = [x, residual.transpose(0, 1), weight] if adds else [x, weight]
    ours = results(add_rms_norm if adds else rms_norm, given, grads)

    def plain(*tensors):
        return plain_add_rms_norm(*tensors) if adds else plain_add_rms_norm(tensors[0], None, *tensors[1:])[1]

    theirs = results(plain, [tensor.double() for tensor in given], [grad.double() for grad in grads])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), other, rtol=2e-5, atol=2e-5)


def test_the_norm_is_of_the_sum_as_it_is_rounded():
    x, residual, weight = torch.randn(6, 32).half(), torch.randn(6, 32).half(), torch.randn(32).half()
    total, normed = add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, rms_norm(total, weight, EPSILON), rtol=0, atol=0)
    assert normed.dtype == torch.float16


@pytest.mark.filterwarnings("ignore:RMS norm of .* the kernel takes")
@pytest.mark.parametrize(("width", "dtype"), [(8, torch.float64), (16_385, torch.float32)])
def test_what_the_kernel_does_not_take_goes_by_plain_torch(width, dtype):
    x, residual, weight = (torch.randn(shape, dtype=dtype) for shape in ((2, width), (2, width), (width,)))
    grads = [torch.randn(2, width, dtype=dtype) for _ in range(2)]
    ours, theirs = (results(norm, [x, residual, weight], grads) for norm in (add_rms_norm, plain_add_rms_norm))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)
