"""Attention for Megatron-Core without TransformerEngine: its core, over CP ranks too, and rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention import causal_attention
from parallel.context import gathered_attention, ring_attention

GATHER, RING = "all_gather", "p2p"
"""Megatron's words for the ways of context parallelism (TransformerConfig.cp_comm_type)."""


class CausalAttention(nn.Module):
    """Causal core attention, which does not hold the score matrix in memory.

    Takes query [sequence, batch, heads, head_dim] and key, value [sequence, batch, kv_heads, head_dim] of this rank's
    heads and zigzag chunks of the sequence; gives [sequence, batch, heads * head_dim]. Query head i reads key head
    i // (heads // kv_heads). What Megatron calls the mask is here the documents [batch, whole sequence] of
    `parallel.context`, on the CPU, or None. Communication: that of `parallel.context`, none without cp.
    """

    def __init__(
        self,
        config: Any,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self._group = pg_collection.cp
        self._across_ranks = gathered_attention if cp_comm_type == GATHER else ring_attention

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> Tensor:
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        scale = query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        if self._group.size() == 1 and attention_mask is None:
            out = causal_attention(query, key, value, scale)
        else:
            out = self._across_ranks(query, key, value, self._group, attention_mask, scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class Rotations(nn.Module):
    """The angles of rotary position embedding (Su et al. 2021) at positions that are given.

    In the place of GPTModel's own, which ignores the positions that the model is called with: it counts from 0, and
    knows of no documents.
    """

    positions: Tensor
    """Of the tokens of this forward pass, int64 [batch or 1, sequence of this context parallel rank]."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self._half, self._theta = head_dim // 2, theta

    def get_rotary_seq_len(self, *unused: Any) -> int:
        """GPTModel asks before it calls `forward`; the positions say it."""
        return self.positions.shape[1]

    def forward(self, length: int, **unused: Any) -> Tensor:
        """Angles, fp32 [sequence, batch or 1, 1, head_dim]."""
        steps = torch.arange(self._half, dtype=torch.float32, device=self.positions.device) / self._half
        angles = self.positions.T[..., None] * self._theta**-steps
        return torch.cat((angles, angles), -1)[:, :, None]


def rotate_as_called(model: nn.Module, head_dim: int, theta: float) -> None:
    """Have a GPTModel rotate by the positions that are the second argument of its forward."""
    rotations = Rotations(head_dim, theta)
    model.rotary_pos_emb = rotations

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        rotations.positions = arguments[1]

    model.register_forward_pre_hook(before)
