"""Which ranks hold which expert of a layer: what FSSDP decides, and what its collectives carry out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """Holders of each expert among the ranks 0 to `ranks` - 1 of a group. Raises ValueError where it cannot be one.

    Where experts are sharded each has one holder, its owner, who alone has its optimizer state; where they are
    materialised it has its owner and any others.
    """

    ranks: int
    holders: tuple[tuple[int, ...], ...]
    """By expert; ranks ascending."""

    def __post_init__(self) -> None:
        for expert, held in enumerate(self.holders):
            if not held:
                raise ValueError(f"expert {expert} of {len(self.holders)} has no holder")
            if any(after <= before for before, after in itertools.pairwise(held)):
                raise ValueError(f"the holders of expert {expert} do not ascend: {held}")
            if held[0] < 0 or held[-1] >= self.ranks:
                raise ValueError(f"the holders of expert {expert} are not all among {self.ranks} ranks: {held}")

    @classmethod
    def of(cls, ranks: int, holders: Iterable[Iterable[int]]) -> Placement:
        """From holders of each expert in any order, named any number of times."""
        return cls(ranks, tuple(tuple(sorted(set(held))) for held in holders))

    @classmethod
    def sharded(cls, owners: Sequence[int], ranks: int) -> Placement:
        """Each expert with its owner alone."""
        return cls(ranks, tuple((owner,) for owner in owners))

    @classmethod
    def even(cls, experts: int, ranks: int) -> Placement:
        """Expert parallelism's: runs of experts / ranks, which must be whole."""
        if experts % ranks:
            raise ValueError(f"ep={ranks} does not divide experts={experts}")
        return cls.sharded([expert * ranks // experts for expert in range(experts)], ranks)

    @property
    def experts(self) -> int:
        return len(self.holders)

    @cached_property
    def is_sharded(self) -> bool:
        return all(len(held) == 1 for held in self.holders)

    @cached_property
    def is_in_order(self) -> bool:
        """Whether experts that one rank owns follow one another, and those of a lower rank come first."""
        return self.is_sharded and all(before <= after for before, after in itertools.pairwise(self.holders))

    @property
    def copies(self) -> int:
        """Experts that are held beyond once: what a SparseAllGather from a sharding within this moves, in experts."""
        return sum(len(held) - 1 for held in self.holders)

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Experts, ascending."""
        return self._held[rank]

    @cached_property
    def _held(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in range(self.ranks)]
        for expert, held in enumerate(self.holders):
            for rank in held:
                found[rank].append(expert)
        return tuple(map(tuple, found))

    def within(self, other: Placement) -> bool:
        """Whether whoever holds an expert here holds it there."""
        return self.ranks == other.ranks and all(
            set(ours) <= set(theirs) for ours, theirs in zip(self.holders, other.holders, strict=True)
        )
