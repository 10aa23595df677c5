"""Which rank is slow, and by what: compute, data, network, or the tokens that routing sends it.

A collective makes all step times equal, so what is compared is a rank's time before it waits, with that of ranks that
do the same work: those of one pipeline stage. By how much a rank is slower is the median over a window of what it takes
beyond the median of its peers (without itself: it is not to hide in its own median). It is slow where that is a share
that matters, in nearly all steps, for what else a machine does comes in bursts; and more than the spread of all such
differences explains (median absolute deviation). Experts with more tokens take longer: that is subtracted before a
machine is called slow. Pure functions of what is reported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.messages import StepReport
from parallel.layout import Layout

Array = NDArray[np.float64]
Cause = Literal["compute", "data", "network", "routing"]

WINDOW = 16
"""Steps of which medians are taken: a rank that turns a fifth slower is told within 20, where steps vary by 5%."""

MATTERS = 0.1
"""Share by which a rank is slower than its peers before anybody is told."""
_LASTING = 0.25
"""Share of a window's steps in which it may be less."""
_MATTERS_OF_STEP = 0.03
"""And share of a step that its peers wait for it."""

_EVERY = 2
"""Steps between two judgements."""

_CLEARLY_APART = 0.01
"""Routed tokens, over the mean, by which two ranks differ enough to tell a slope."""

CERTAIN = 5.0
"""Standard deviations of a score, by the spread of all scores, beyond which chance is no explanation."""


@dataclass(frozen=True)
class Timing:
    """One rank's step, seconds."""

    data: float
    compute: float
    """Its own: without what it waited in collectives."""
    waited: Mapping[str, float]
    """In collectives, by the axes of their group: `{"tp": 0.01, "dp cp": 0.04}`."""
    routed: float | None = None
    """Rows that its experts computed, in any unit that is that of its stage; None where it has no experts."""

    @property
    def total(self) -> float:
        return self.data + self.compute + sum(self.waited.values())

    @classmethod
    def of(cls, report: StepReport) -> Timing:
        phases, waited = report.phase_seconds, report.waited_seconds
        own = phases.get("compute", 0.0) - sum(waited.values())
        return cls(phases.get("data", 0.0), own, waited, report.routed_rows)


@dataclass(frozen=True)
class Straggler:
    rank: int
    cause: Cause
    slower: float
    """Over its peers: 0.2 is a fifth longer."""
    lost: float
    """Seconds of a step that its peers wait for it."""

    @property
    def text(self) -> str:
        what = {
            "compute": "computes more slowly than its peers",
            "data": "waits longer for its data than its peers",
            "network": "lets its groups wait longer than others do: its link is slow",
            "routing": "is sent more tokens than its peers",
        }[self.cause]
        return f"rank {self.rank} {what}: {self.lost * 1e3:.0f} ms of each step, {self.slower:+.0%}"


class Stragglers:
    """Fed with every step's timings; tells who is slow at this moment."""

    def __init__(self, layout: Layout) -> None:
        self._groups = {axes: layout.groups(*axes.split()) for axes in ("tp", "cp", "dp", "dp cp", "ep", "pp")}
        self._stages = [group for group in layout.groups("tp", "cp", "dp") if len(group) > 1]
        self._seen = 0
        self._slow: tuple[Straggler, ...] = ()
        self._steps: deque[Mapping[int, Timing]] = deque(maxlen=WINDOW)

    def begin(self) -> None:
        """With an attempt, whose ranks are others."""
        self._seen, self._slow = 0, ()
        self._steps.clear()

    def add(self, reports: Mapping[int, StepReport]) -> tuple[Straggler, ...]:
        """All ranks' reports of a step. Who is slow over the window, the worst first; none before it is full."""
        return self.add_timings({rank: Timing.of(report) for rank, report in reports.items()})

    def add_timings(self, timings: Mapping[int, Timing]) -> tuple[Straggler, ...]:
        self._steps.append(timings)
        self._seen += 1
        if self._seen >= WINDOW and self._seen % _EVERY == 0:
            self._slow = self._judge()
        return self._slow

    def slower(self) -> list[float] | None:
        """By rank: its time before it waits over its peers', less 1; 0 where it has none. Once a window."""
        if self._seen == 0 or self._seen % WINDOW:
            return None
        found = [0.0] * sum(map(len, self._groups["tp"]))
        for stage in self._stages:
            seconds = np.array([[step[rank].data + step[rank].compute for rank in stage] for step in self._steps])
            usual = np.stack([_without_each(step) for step in seconds])
            over = np.median(seconds - usual, axis=0) / np.maximum(np.median(usual, axis=0), 1e-9)
            for at, rank in enumerate(stage):
                found[rank] = round(float(over[at]), 3)
        return found

    def _judge(self) -> tuple[Straggler, ...]:
        found: dict[int, Straggler] = {}
        for stage in self._stages:
            for straggler in self._of_stage(stage):
                found.setdefault(straggler.rank, straggler)
        if not found:
            found = {straggler.rank: straggler for straggler in self._of_network()}
        return tuple(sorted(found.values(), key=lambda straggler: -straggler.lost))

    def _of_stage(self, stage: Sequence[int]) -> Iterable[Straggler]:
        timings = [[step[rank] for rank in stage] for step in self._steps]
        data = np.array([[each.data for each in step] for step in timings])
        compute = np.array([[each.compute for each in step] for step in timings])
        matters = _MATTERS_OF_STEP * float(np.median([[each.total for each in step] for step in timings]))
        for at, slower, lost in _outliers(data, matters):
            yield Straggler(stage[at], "data", slower, lost)
        slow = {at: (slower, lost) for at, slower, lost in _outliers(compute, matters)}
        if not all(each.routed is not None for step in timings for each in step):
            for at, (slower, lost) in slow.items():
                yield Straggler(stage[at], "compute", slower, lost)
            return
        routed = np.array([[each.routed for each in step] for step in timings])
        suspects = {at for at, _, _ in _outliers(_without_routing(compute, routed), matters)} | set(slow)
        for at in sorted(suspects):
            unexplained = {each[0]: each[1:] for each in _outliers(_without_routing(compute, routed, at), matters)}
            if at in unexplained:
                yield Straggler(stage[at], "compute", *unexplained[at])
            elif at in slow:
                yield Straggler(stage[at], "routing", *slow[at])

    def _of_network(self) -> Iterable[Straggler]:
        """Nobody arrives late and yet some groups wait longer than others of their kind: who is in all of those.

        A rank whose link is slow makes every group wait that it is in. Where each kind has one group only, nobody can
        be told from the others.
        """
        suspects: set[int] | None = None
        slower = lost = 0.0
        matters = _MATTERS_OF_STEP * float(np.median([each.total for step in self._steps for each in step.values()]))
        for axes, groups in self._groups.items():
            if len(groups) < 2 or not all(axes in each.waited for step in self._steps for each in step.values()):
                continue
            waited = [
                [np.median([step[rank].waited[axes] for rank in group]) for group in groups] for step in self._steps
            ]
            slow = _outliers(np.array(waited), matters)
            if not slow:
                continue
            members = {rank for at, _, _ in slow for rank in groups[at]}
            suspects = members if suspects is None else suspects & members
            slower = max(slower, *(share for _, share, _ in slow))
            lost = max(lost, *(seconds for _, _, seconds in slow))
        if suspects is not None and len(suspects) == 1:
            yield Straggler(suspects.pop(), "network", slower, lost)


def _outliers(seconds: Array, matters: float) -> list[tuple[int, float, float]]:
    """Columns of seconds [steps, ranks] that are longer than the others: which, by what share, seconds of a step."""
    steps, ranks = seconds.shape
    if ranks < 2:
        return []
    usual = np.stack([_without_each(step) for step in seconds])
    over = seconds - usual
    lost, typical = np.median(over, axis=0), np.median(usual, axis=0)
    # How much one step's difference varies, whoever's it is; of a median of so many steps, as of a normal.
    spread = float(np.median(np.abs(over - lost)))
    certain = CERTAIN * 1.4826 * spread * 1.2533 / steps**0.5
    lasting = np.quantile(over, _LASTING, axis=0)
    slow = (lasting > MATTERS * typical) & (lasting > matters) & (lost > certain)
    return [(int(at), float(lost[at] / max(typical[at], 1e-9)), float(lost[at])) for at in np.flatnonzero(slow)]


def _without_each(values: Array) -> Array:
    """For each value the median of the others."""
    order = np.argsort(values)
    ordered = values[order]
    left = len(values) - 1
    place = np.empty(len(values), dtype=int)
    place[order] = np.arange(len(values))

    def nth(number: int) -> Array:
        """Of the others."""
        return np.where(place > number, ordered[number], ordered[min(number + 1, left)])

    found: Array = nth(left // 2) if left % 2 else (nth(left // 2 - 1) + nth(left // 2)) / 2
    return found


def _without_routing(compute: Array, routed: Array, suspect: int = -1) -> Array:
    """Own compute [steps, ranks] less what a line through routed rows [steps, ranks], over their mean, explains.

    Its slope is a median of slopes of pairs half a sample apart (Theil 1950, the incomplete method), weighted by how
    far apart: pairs of ranks within a step, without the suspect, and pairs of steps within a rank. How slow the
    suspect's machine is changes neither, and steps of unequal length do not look like routing.
    """
    share = routed / np.maximum(routed.mean(1, keepdims=True), 1e-9)
    others = np.arange(compute.shape[1]) != suspect
    relative = compute - np.median(compute, axis=1, keepdims=True)
    pairs = [_half_apart(share[:, others].T, compute[:, others].T), _half_apart(share, relative)]
    apart, longer = (np.concatenate([pair[part] for pair in pairs]) for part in (0, 1))
    clear = apart > _CLEARLY_APART
    left: Array = compute - max(0.0, _weighted_median(longer[clear] / apart[clear], apart[clear])) * (share - 1)
    return left


def _half_apart(tokens: Array, seconds: Array) -> tuple[Array, Array]:
    """Of each column, sorted by its tokens: differences of tokens and of seconds between its halves."""
    half = tokens.shape[0] // 2
    order = np.argsort(tokens, axis=0)
    tokens, seconds = np.take_along_axis(tokens, order, 0), np.take_along_axis(seconds, order, 0)
    last = tokens.shape[0] - half
    return (tokens[last:] - tokens[:half]).ravel(), (seconds[last:] - seconds[:half]).ravel()


def _weighted_median(values: Array, weights: Array) -> float:
    """0 of none."""
    if not len(values):
        return 0.0
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])
