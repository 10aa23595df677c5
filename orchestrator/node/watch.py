"""Whether a node's ranks make progress, judged from outside by what each phase usually takes. Pure.

One rule serves a step of 50 ms and one of 50 s: a phase is too long beyond five times what it took in 99 cases of 100
on this node, and never before a floor. A rank's first of an attempt is told from its later ones, for it takes what is
made once: kernels, communicators, pinned memory. Ranks that wait in a collective wait for somebody: who is not in one
is to blame, or is in another than the rest.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.pulse import Beat, Phase

Kind = Literal["stopped", "no progress", "skipped a collective", "waiting"]
"""stopped: by a signal. no progress: it computes, spins or holds a lock, outside collectives. waiting: with all others
of its node, for a rank of another."""

_FACTOR = 5.0
_FLOOR: dict[Phase, float] = {"data": 5.0, "compute": 5.0, "agree": 5.0}
_STOPPED = 5.0
_MOST_PHASES = 30
"""Of one step: who has left more is going in circles."""
_CIRCLES = 5.0
"""Seconds after which that is told of a rank for which nobody waits."""
_LONG_FLOOR = 30.0
"""Of phases that stores and evaluations stretch."""
_FIRST: dict[Phase, float] = {"start": 600.0, "build": 900.0, "restore": 3600.0, "checkpoint": 3600.0}
_FIRST_OTHERS = 300.0
"""Before a first was ever over on this node, nothing is known of it."""
_ORDER: tuple[Phase, ...] = ("start", "build", "restore", "data", "compute", "evaluate", "agree", "checkpoint", "end")


@dataclass(frozen=True)
class Reading:
    """One rank at one moment."""

    beat: Beat
    stopped: bool
    """Its process is stopped by a signal."""


@dataclass(frozen=True)
class Stall:
    rank: int
    kind: Kind
    beat: Beat
    seconds: float
    """For which the phase has lasted of whoever has waited longest."""
    limit: float

    @property
    def text(self) -> str:
        beat = self.beat
        last = f", last collective {beat.collective} (number {beat.collectives})" if beat.collective else ""
        what = {
            "stopped": "is stopped by a signal",
            "no progress": "makes no progress",
            "skipped a collective": "is in another collective than its peers",
            "waiting": "waits for a rank of another node",
        }[self.kind]
        return (
            f"rank {self.rank} {what} in {beat.phase} of step {beat.step}: "
            f"{self.seconds:.1f} s, at most {self.limit:.1f} s are usual{last}"
        )


class Watch:
    """Of the ranks of one node, through all their attempts."""

    def __init__(self) -> None:
        self._usual: dict[tuple[Phase, bool], list[float]] = {}
        """Seconds that phases took, and that the first of a rank in an attempt did, ascending; a thousand of each."""
        self._left: set[tuple[int, Phase]] = set()
        """What ranks have left once in this attempt."""
        self._visited: dict[int, tuple[int, int, float]] = {}
        """By rank: its step, how many phases it has left in it, and when it was first seen there."""
        self._stopped: dict[int, float] = {}
        """Ranks that a signal has stopped, by when that was seen first."""

    def begin(self) -> None:
        """With an attempt, whose ranks are others."""
        self._stopped.clear()
        self._visited.clear()
        self._left.clear()

    def limit(self, rank: int, phase: Phase) -> float:
        """Seconds beyond which a phase of a rank is too long."""
        first = self._usual.get((phase, True))
        usual = first if (rank, phase) not in self._left else self._usual.get((phase, False), first)
        if not usual:
            return _FIRST.get(phase, _FIRST_OTHERS)
        return max(_FLOOR.get(phase, _LONG_FLOOR), _FACTOR * usual[int(0.99 * (len(usual) - 1))])

    def look(self, now: float, readings: Mapping[int, Reading]) -> Stall | None:
        """Learn from what is over; tell who is to blame where something takes too long. `now` is monotonic, seconds."""
        for rank, reading in readings.items():
            self._learn(now, rank, reading.beat)
        if stall := self._find_stopped(now, readings) or self._find_circling(now, readings):
            return stall
        late = {
            rank: (now - reading.beat.since) / self.limit(rank, reading.beat.phase)
            for rank, reading in readings.items()
            if reading.beat.phase != "end"
        }
        worst = max(late, key=lambda rank: late[rank], default=None)
        if worst is None or late[worst] <= 1:
            return None
        blamed = self._blamed(readings, worst, late)
        if blamed is None:
            return None
        rank, kind = blamed
        since, phase = readings[worst].beat.since, readings[worst].beat.phase
        return Stall(rank, kind, readings[rank].beat, now - since, self.limit(worst, phase))

    def _find_stopped(self, now: float, readings: Mapping[int, Reading]) -> Stall | None:
        """A rank that cannot run is told of whatever it was at: no phase takes that."""
        self._stopped = {rank: self._stopped.get(rank, now) for rank, reading in readings.items() if reading.stopped}
        for rank, since in self._stopped.items():
            if now - since > _STOPPED:
                return Stall(rank, "stopped", readings[rank].beat, now - since, _STOPPED)
        return None

    def _find_circling(self, now: float, readings: Mapping[int, Reading]) -> Stall | None:
        """A rank that goes from phase to phase of one step is late in none of them."""
        for rank, reading in readings.items():
            _, count, since = self._visited[rank]
            if count > _MOST_PHASES and now - since > _CIRCLES:
                return Stall(rank, "no progress", reading.beat, now - since, _CIRCLES)
        return None

    def _blamed(
        self, readings: Mapping[int, Reading], worst: int, late: Mapping[int, float]
    ) -> tuple[int, Kind] | None:
        """Who it is that `worst` waits for. None where that one is at something that may take longer."""
        for rank, reading in readings.items():
            if reading.stopped:
                return rank, "stopped"
        beats = {rank: reading.beat for rank, reading in readings.items() if reading.beat.phase != "end"}
        outside = [rank for rank, beat in beats.items() if not beat.in_collective]
        if outside:
            # Who is in the earliest part of the run: the others have passed what it is in.
            first = min(outside, key=lambda rank: _place(beats[rank]))
            in_circles = self._visited[first][1] > _MOST_PHASES
            return (first, "no progress") if late[first] > 1 or in_circles else None
        calls = {rank: (beat.step, beat.phase, beat.collective) for rank, beat in beats.items()}
        numbers = Counter(calls.values())
        if len(numbers) == 1:
            return worst, "waiting"
        # The fewest are wrong; of as many, who is further on has left something out.
        rarest = min(numbers.values())
        odd = [rank for rank, call in calls.items() if numbers[call] == rarest]
        return max(odd, key=lambda rank: _place(beats[rank])), "skipped a collective"

    def _learn(self, now: float, rank: int, beat: Beat) -> None:
        step, count, since = self._visited.get(rank, (None, 0, now))
        # What was left since the last look may be of many quick steps before this one: it does not count.
        self._visited[rank] = (step, count + len(beat.over), since) if step == beat.step else (beat.step, 0, now)
        for phase, seconds in beat.over:
            usual = self._usual.setdefault((phase, (rank, phase) not in self._left), [])
            self._left.add((rank, phase))
            insort(usual, seconds)
            if len(usual) > 2000:
                del usual[::2]


def _place(beat: Beat) -> tuple[int, int, int]:
    return beat.step, _ORDER.index(beat.phase), beat.collectives
