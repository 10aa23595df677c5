"""Placements and loads for tests of FSSDP, and the least peak that a placement allows."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from parallel.placement import Placement


def least_peak(placement: Placement, loads: Sequence[float]) -> float:
    """Exactly: some set of ranks alone holds so much that its mean is the peak (Hall 1935, of fractional flows)."""
    most = 0.0
    for mask in range(1, 1 << placement.ranks):
        alone = (
            load for held, load in zip(placement.holders, loads, strict=True) if all(mask >> rank & 1 for rank in held)
        )
        most = max(most, sum(alone) / mask.bit_count())
    return most


@st.composite
def shardings(draw: st.DrawFn, ranks: int = 12, experts: int = 24) -> tuple[Placement, list[int]]:
    """A sharding and loads, not all of them 0."""
    among = draw(st.integers(1, ranks))
    owners = draw(st.lists(st.integers(0, among - 1), min_size=1, max_size=experts))
    loads = draw(st.lists(st.integers(0, 1000), min_size=len(owners), max_size=len(owners)).filter(any))
    return Placement.sharded(owners, among), loads
