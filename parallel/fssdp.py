"""Which experts are copied where, for one iteration: the decisions of fully sharded sparse data parallelism.

After Hecate (materialisation from predicted load, calibration after the gate), with a rule of our own for what is
copied. Copies take load off ranks that are predicted to have more than TOLERANCE above the mean, and there are about
as few of them as bring the most loaded rank as low as it can be brought. What prediction errs by is covered by what the
last iterations would have needed: the placement serves their mean first, then each of them, then their trend. So loads
that are even or steady, or that the link cannot help, cost few copies or none.

With 64 experts, Zipf-distributed and wandering by 5% an iteration, and memory for two copies a rank, the most loaded of
32 ranks has 1.02 times the mean (at worst 1.09) with 49 copies; served for the mean alone 1.08 (1.21) with 25. Hecate's
rule, by which all 64 go to the experts with the most load a replica, has 1.00, and makes 64 however little there is to
gain.

All is computed alike on all ranks from equal loads: ties go to the lower index.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from parallel.estimates.hardware import Link
from parallel.fssdp_dispatch import Division, Topology, divide, peak
from parallel.placement import Placement

WINDOW = 5
"""Iterations whose mean predicts the next (Hecate, section 4)."""
TOLERANCE = 0.03
"""Of the mean load: what a rank may have above it, and what copies must take off the most loaded rank to be made."""


class LoadHistory:
    """A layer's loads in the last WINDOW iterations."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._iterations: deque[tuple[int, ...]] = deque(maxlen=WINDOW)

    def add(self, loads: Sequence[int]) -> None:
        """Tokens of each expert in the iteration that has ended, over all ranks."""
        if len(loads) != self._experts:
            raise ValueError(f"{len(loads)} loads of {self._experts} experts")
        self._iterations.append(tuple(loads))

    def predicted(self) -> list[float]:
        """Of each expert, the mean; even loads of 1 before any iteration."""
        if not self._iterations:
            return [1.0] * self._experts
        return [sum(loads) / len(self._iterations) for loads in zip(*self._iterations, strict=True)]

    def forecasts(self) -> list[Sequence[float]]:
        """What the next iteration may be like: the mean, each iteration from the newest on, and the trend.

        The trend is as far beyond the newest as that is beyond the mean.
        """
        mean = self.predicted()
        if not self._iterations:
            return [mean]
        trend = [max(0.0, 2 * last - middle) for last, middle in zip(self._iterations[-1], mean, strict=True)]
        return [mean, *reversed(self._iterations), trend]


@dataclass(frozen=True)
class Limits:
    """What copies of a layer's experts may take of a rank."""

    slots: int
    """Experts of others that a rank has memory for."""
    movable: int
    """Experts that a rank's link moves while there is something to hide it behind.

    A copy is handed on: its owner sends an expert once, each receiver but the last sends it on as it arrives (a
    pipelined ring, as NCCL broadcasts). So a rank receives each of its copies once and sends it at most once, and
    sends each of its own experts that has copies once: it is the sum of both that is limited, which bounds what is
    sent and what is received. If owners sent every copy themselves, an expert with many would hold all up at its owner.
    """


@dataclass(frozen=True)
class Wire:
    """The link that a rank's copies cross: the network's where the ranks are of several nodes."""

    link: Link
    expert_bytes: float

    def movable(self, window_seconds: float, experts: int) -> int:
        """Experts of `experts` that fit into a window: Hecate's t = B (T - latency) / bytes of an expert."""
        fitting = (window_seconds - self.link.latency_seconds) * self.link.bytes_per_second / self.expert_bytes
        return int(max(0.0, min(experts, fitting)))

    def seconds(self, experts: int) -> float:
        """That a gather takes whose busiest rank moves so many."""
        return self.link.latency_seconds + experts * self.expert_bytes / self.link.bytes_per_second


@dataclass(frozen=True)
class Means:
    """What copies of a layer's experts have at their disposal."""

    topology: Topology
    limits: Limits
    token_seconds: float = 0.0
    """Forward and backward of one token in one expert."""
    wire: Wire | None = None
    """None: nothing is copied once the gate has spoken."""


def busiest(before: Placement, after: Placement) -> int:
    """Experts that the busiest rank moves between two placements, handed on as `Limits.movable` says.

    The first of several who held an expert sends it.
    """
    return max(_moved(before, after))


def materialise(sharded: Placement, forecasts: Sequence[Sequence[float]], limits: Limits) -> Placement:
    """The owners of `sharded` and the copies that serve `forecasts` [number][experts], the earlier ones first.

    `sharded` itself where no rank is far above the mean, or where there is neither memory nor time for a copy.
    """
    placement = sharded
    for loads in forecasts:
        placement = _extended(sharded, placement, loads, limits, sharded)
    return placement


def calibrate(
    sharded: Placement, placement: Placement, loads: Sequence[int], slots: int, token_seconds: float, wire: Wire
) -> Placement | None:
    """`placement` and further copies, where what they save is more than what a gather that nothing hides takes.

    Once the gate has spoken: loads [experts] are what it chose, over all ranks. Saved are `token_seconds` (forward and
    backward, of one token in one expert) for each token that the most loaded rank has less. The gather takes as long as
    its busiest rank. None where it is not worth it.
    """
    before, mean = peak(placement, loads), sum(loads) / placement.ranks
    if before <= mean * (1 + TOLERANCE):
        return None
    best, best_saved = None, 0.0
    for most in range(1, slots + 1):
        # All ranks wait for this, in each layer: what is above the mean is all that can be saved.
        if (before - mean) * token_seconds - wire.seconds(most) <= best_saved:
            break
        extended = _extended(sharded, placement, loads, Limits(slots, most), placement)
        moved = busiest(placement, extended)
        saved = (before - peak(extended, loads)) * token_seconds - wire.seconds(moved)
        if moved and saved > best_saved:
            best, best_saved = extended, saved
    return best


def _moved(before: Placement, after: Placement) -> list[int]:
    """By rank: experts received, and experts sent by the first who held them."""
    moved = [0] * after.ranks
    for held, now in zip(before.holders, after.holders, strict=True):
        if len(now) > len(held):
            moved[held[0]] += 1
            for rank in set(now) - set(held):
                moved[rank] += 1
    return moved


def _extended(
    sharded: Placement, placement: Placement, loads: Sequence[float], limits: Limits, moved_from: Placement
) -> Placement:
    """`placement` with copies for `loads`; `moved_from` is what there was before anything of this gather moved."""
    division = divide(placement, loads, enough=TOLERANCE)
    mean, most = sum(loads) / placement.ranks, max(division.by_rank)
    if min(limits.slots, limits.movable) < 1 or most <= mean * (1 + TOLERANCE):
        return placement

    def reached(level: float) -> Placement | None:
        return _Shedding(sharded, placement, division, limits, moved_from).to(level)

    low, high = mean * (1 + TOLERANCE), most - mean * TOLERANCE
    best = reached(low)
    if best is not None:
        return best
    while high - low > mean * TOLERANCE / 2:
        level = (low + high) / 2
        found = reached(level)
        if found is None:
            low = level
        else:
            best, high = found, level
    return best or placement


class _Shedding:
    """Ranks above a level give copies of their largest experts to the ranks that have least."""

    def __init__(
        self,
        sharded: Placement,
        placement: Placement,
        division: Division,
        limits: Limits,
        moved_from: Placement,
    ) -> None:
        self._by_rank = list(division.by_rank)
        self._held: list[dict[int, float]] = [{} for _ in range(placement.ranks)]
        self._free = [limits.slots] * placement.ranks
        for expert, (held, parts) in enumerate(zip(placement.holders, division.taken, strict=True)):
            for rank, part in zip(held, parts, strict=True):
                self._held[rank][expert] = part
                self._free[rank] -= rank != sharded.holders[expert][0]
        self._may_move = [limits.movable - moved for moved in _moved(moved_from, placement)]
        self._senders = [held[0] for held in moved_from.holders]
        self._sent = {
            expert
            for expert, (held, now) in enumerate(zip(moved_from.holders, placement.holders, strict=True))
            if len(now) > len(held)
        }

    def to(self, level: float) -> Placement | None:
        """None where some rank stays above."""
        edge = level * (1 + 1e-9)
        largest = [max(held.values(), default=0.0) for held in self._held]
        givers = [rank for rank, load in enumerate(self._by_rank) if load > edge]
        takers = [(load, rank) for rank, load in enumerate(self._by_rank) if load < level and self._takes(rank)]
        heapq.heapify(takers)
        # Short of places, givers of many small parts give to one of larger parts, who gives for both in fewer.
        parts = sum(ceil((self._by_rank[giver] - level) / largest[giver]) for giver in givers)
        short = parts - sum(min(self._free[rank], self._may_move[rank]) for _, rank in takers)
        givers.sort(key=lambda rank: (largest[rank], self._by_rank[rank], rank))
        for giver, following in itertools.pairwise(givers[: short + 1] if short > 0 else []):
            pair = self._copy(giver, [(self._by_rank[following], following)])
            if pair is not None:
                expert, taker = pair
                self._give(expert, giver, taker, min(self._by_rank[giver] - level, self._held[giver][expert]))
        for giver in sorted(givers, key=lambda rank: (-self._by_rank[rank], rank)):
            while self._by_rank[giver] > edge:
                pair = self._copy(giver, takers)
                if pair is None:
                    return None
                expert, taker = pair
                part = min(self._by_rank[giver] - level, level - self._by_rank[taker], self._held[giver][expert])
                self._give(expert, giver, taker, part)
                if self._takes(taker) and self._by_rank[taker] * (1 + 1e-9) < level:
                    heapq.heappush(takers, (self._by_rank[taker], taker))
        holders: list[list[int]] = [[] for _ in self._senders]
        for rank, held in enumerate(self._held):
            for expert in held:
                holders[expert].append(rank)
        return Placement(len(self._held), tuple(tuple(ranks) for ranks in holders))

    def _takes(self, rank: int) -> bool:
        return self._free[rank] > 0 and self._may_move[rank] > 0

    def _copy(self, giver: int, takers: list[tuple[float, int]]) -> tuple[int, int] | None:
        """The giver's largest expert that can be sent to a taker who lacks it, and that taker, no longer among them."""
        held = self._held[giver]
        for _, expert in sorted((-part, expert) for expert, part in held.items() if part > 0):
            if expert not in self._sent and self._may_move[self._senders[expert]] < 1:
                continue
            aside, found = [], None
            while takers and found is None:
                taker = heapq.heappop(takers)
                if expert in self._held[taker[1]]:
                    aside.append(taker)
                elif self._takes(taker[1]):
                    found = taker[1]
            for taker in aside:
                heapq.heappush(takers, taker)
            if found is not None:
                return expert, found
        return None

    def _give(self, expert: int, giver: int, taker: int, part: float) -> None:
        for rank, change in ((giver, -part), (taker, part)):
            self._by_rank[rank] += change
            self._held[rank][expert] = self._held[rank].get(expert, 0.0) + change
        self._free[taker] -= 1
        self._may_move[taker] -= 1
        if expert not in self._sent:
            self._sent.add(expert)
            self._may_move[self._senders[expert]] -= 1
