"""How many rows routing has a rank's experts compute: what makes one rank slower than another with nothing amiss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class RoutedRows:
    """Counts the rows of what these modules are given first, without a look at any tensor's content."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        """experts: modules whose first argument is [rows, hidden]."""
        self._count = 0
        self._any = False
        for each in experts:
            self._any = True
            each.register_forward_pre_hook(self._see)

    def take(self) -> int | None:
        """Since this was last asked; what backward computes again counts again. None where there are no experts."""
        count, self._count = self._count, 0
        return count if self._any else None

    def _see(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        self._count += given[0].shape[0]
