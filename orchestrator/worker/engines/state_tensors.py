"""The tensors that are an engine's state, for who copies them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def nothing() -> None:
    """What an engine calls before it updates where nobody waits for that."""


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What a torch optimizer steps, and what it keeps of each."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter.data
            yield from (kept for _, kept in sorted(optimizer.state[parameter].items()) if isinstance(kept, Tensor))


def each_once(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Without those that are the same memory as an earlier one: weights that an optimizer steps in place."""
    found: dict[tuple[int, int], Tensor] = {}
    for tensor in tensors:
        if tensor.numel():
            assert tensor.is_contiguous(), "a state that is scattered in memory"
            found.setdefault((tensor.data_ptr(), tensor.numel() * tensor.element_size()), tensor)
    return list(found.values())
