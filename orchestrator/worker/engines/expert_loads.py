"""How many tokens each expert has: recorded every tenth step, for pictures and for plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.replicas import is_backward

EVERY = 10
"""Steps. A count is one small kernel a layer and micro-batch."""


class ExpertLoads:
    """Of a rank's layers, over all ranks that route other tokens to the same experts."""

    def __init__(
        self, routers: Mapping[int, nn.Module], counts: Callable[[Any], Tensor], group: dist.ProcessGroup
    ) -> None:
        """routers: by layer, from 0. counts: of what one gives, tokens of each expert."""
        self._layers, self._group = sorted(routers), group
        self._counts: dict[int, Tensor] = {}
        self._is_asked = False
        for layer, router in routers.items():
            router.register_forward_hook(partial(self._see, layer, counts))

    def begin_step(self, step: int) -> None:
        self._counts.clear()
        self._is_asked = step % EVERY == 0

    def end_step(self) -> dict[int, list[int]] | None:
        """By layer, from the group's first rank alone, and of a step that is recorded. Collective over the group."""
        if not self._is_asked or not self._layers:
            return None
        self._is_asked = False
        loads = torch.stack([self._counts[layer] for layer in self._layers])
        dist.all_reduce(loads, group=self._group)
        if dist.get_rank(self._group):
            return None
        return dict(zip(self._layers, loads.tolist(), strict=True))

    def _see(self, layer: int, counts: Callable[[Any], Tensor], router: nn.Module, _: Any, given: Any) -> None:
        if self._is_asked and router.training and not is_backward():
            seen = counts(given).long()
            self._counts[layer] = self._counts[layer] + seen if layer in self._counts else seen
