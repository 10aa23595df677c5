"""Products of expert runs: the kernels and plain torch beside fp64, for skewed and empty experts and poisoned tails."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import grouped_gemm

counts = st.lists(st.sampled_from([0, 0, 1, 3, 32, 40]), min_size=1, max_size=5)
sizes = st.sampled_from([4, 32, 36])


def drawn(counts: list[int], inner: int, outer: int, tail: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(len(counts) * 1000 + inner + outer)
    rows = torch.randn(sum(counts) + tail, inner, generator=generator)
    grad = torch.randn(sum(counts) + tail, outer, generator=generator)
    weights = torch.randn(len(counts), outer, inner, generator=generator)
    for tensor in (rows, grad):
        tensor[sum(counts) :] = torch.nan
    return rows, grad, weights, torch.tensor(counts).cumsum(0).to(torch.int32)


def expected(rows: torch.Tensor, grad: torch.Tensor, weights: torch.Tensor, counts: list[int]):
    """In fp64, by the definition of each."""
    rows, grad, weights = rows.double(), grad.double(), weights.double()
    out, of_rows = torch.zeros_like(grad), torch.zeros_like(rows)
    of_weights = torch.zeros_like(weights)
    begin = 0
    for expert, count in enumerate(counts):
        run = slice(begin, begin + count)
        out[run] = torch.einsum("ni,oi->no", rows[run], weights[expert])
        of_rows[run] = torch.einsum("no,oi->ni", grad[run], weights[expert])
        of_weights[expert] = torch.einsum("no,ni->oi", grad[run], rows[run])
        begin += count
    return out, of_rows, of_weights


@pytest.mark.parametrize("way", ["kernel", "plain"])
@settings(max_examples=12, deadline=None)
@given(counts=counts, inner=sizes, outer=sizes, tail=st.sampled_from([0, 5, 70]))
def test_products_of_runs_are_those_of_fp64(way, counts, inner, outer, tail):
    rows, grad, weights, ends = drawn(counts, inner, outer, tail)
    if way == "kernel":
        found = (
            grouped_gemm.linear(rows, weights, ends),
            grouped_gemm.input_gradient(grad, weights, ends),
            grouped_gemm.weight_gradient(grad, rows, ends),
        )
    else:
        found = (
            grouped_gemm.plain_linear(rows, weights, ends),
            grouped_gemm.plain_linear(grad, weights.mT, ends),
            grouped_gemm.plain_weight_gradient(grad, rows, ends),
        )
    for ours, theirs in zip(found, expected(rows, grad, weights, counts), strict=True):
        # To fp32's rounding of the largest element, for sums of large numbers may come to small ones.
        assert ours.shape == theirs.shape
        assert not ours.numel() or (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


def test_gradients_that_are_no_plain_matrices_are_taken():
    rows, grad, weights, ends = drawn([5, 0, 33], 36, 32, 0)
    turned = grad.T.contiguous().T
    constant = torch.ones(1, 32).expand(38, 32)
    for other in (turned, constant):
        straight = other.contiguous()
        assert not other.is_contiguous()
        found = grouped_gemm.weight_gradient(other, rows, ends)
        torch.testing.assert_close(found, grouped_gemm.plain_weight_gradient(straight, rows, ends))
        found = grouped_gemm.input_gradient(other, weights, ends)
        torch.testing.assert_close(found, grouped_gemm.plain_linear(straight, weights.mT, ends))


@pytest.mark.parametrize(("inner", "dtype"), [(6, torch.float32), (32, torch.float64)])
def test_what_the_kernel_does_not_take_goes_by_torch_and_is_told_once(inner, dtype, recwarn):
    rows, _, weights, ends = drawn([3, 4], inner, 32, 0)
    for _ in range(2):
        found = grouped_gemm.linear(rows.to(dtype), weights.to(dtype), ends)
        torch.testing.assert_close(found, grouped_gemm.plain_linear(rows.to(dtype), weights.to(dtype), ends))
    (told,) = recwarn
    assert f"7x{inner} {str(dtype)[6:]}, 2x32x{inner}" in str(told.message)
