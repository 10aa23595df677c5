from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from models.megatron_specs import CausalAttention, RMSNorm


def test_rms_norm_is_root_mean_square_in_plain_torch() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True), hidden_size=24, eps=1e-3)
    norm.weight.data.normal_()
    hidden = torch.randn(5, 3, 24)
    plain = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(hidden), plain)
    assert norm.weight.sequence_parallel is True


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_causal_attention_is_masked_softmax_over_grouped_heads(kv_heads: int) -> None:
    torch.manual_seed(0)
    sequence, batch, heads, width = 7, 2, 6, 8
    query = torch.randn(sequence, batch, heads, width)
    key, value = torch.randn(2, sequence, batch, kv_heads, width)
    found = CausalAttention(SimpleNamespace())(query, key, value)
    shared = [part.repeat_interleave(heads // kv_heads, dim=2) for part in (key, value)]
    scores = torch.einsum("qbnd,kbnd->bnqk", query, shared[0]) / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(sequence, sequence).triu(1).bool(), -math.inf)
    plain = torch.einsum("bnqk,kbnd->qbnd", scores.softmax(-1), shared[1]).reshape(sequence, batch, heads * width)
    torch.testing.assert_close(found, plain)
