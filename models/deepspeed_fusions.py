"""What the reference model writes out in plain torch, by this project's kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import attention, rope
from models.reference import Attention, causal_attention


def install(decoder: nn.Module) -> None:
    """Give attention its kernels, before anything divides it."""
    for module in decoder.modules():
        if isinstance(module, Attention):
            module.core, module.rotate = attend, rotate


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """An AttentionCore."""
    if documents is not None:
        return causal_attention(query, key, value, documents)
    return attention.causal_attention(query, key, value, query.shape[-1] ** -0.5)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """As `models.reference.rotate`."""
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = positions.T[..., None] * theta**-steps
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return rope.rotate(x.permute(2, 0, 1, 3), angles).permute(1, 2, 0, 3)
