"""Queries' gradients in one order beside plain attention's in fp64."""

import pytest
import torch

from kernels.attention import plain_attend, plain_attend_backward
from kernels.query_gradient import query_gradient


@pytest.mark.parametrize(("keys", "causal"), [(64, True), (64, False), (128, False)])
def test_queries_gradients_are_those_of_fp64(keys, causal):
    generator = torch.Generator().manual_seed(keys)

    def heads(count, length):
        return torch.randn(length, 2, count, 16, generator=generator).permute(1, 2, 0, 3)

    query, grad, key, value = heads(4, 64), heads(4, 64), heads(2, keys), heads(2, keys)
    precise = [tensor.double() for tensor in (query, key, value)]
    out, lse = plain_attend(*precise, 0.3, causal=causal)
    # As though there were more keys elsewhere, which ring attention has.
    out, lse = out + 0.1, lse + 0.2
    expected = plain_attend_backward(grad.double(), *precise, out, lse, 0.3, causal=causal)[0]
    found = query_gradient(grad, query, key, value, out.float(), lse.float(), 0.3, causal=causal)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
