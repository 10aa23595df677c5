"""The memory that a step will need, told by shorter ones: each tensor's size as it grows with the sequence.

A step at three short lengths asks for the same memory in the same order. Of each request the three sizes say how it
grows: not at all, with the tokens, or with their square; one that routing decides grows with them on the average.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import NamedTuple

from parallel.memory_plan import MemoryPlan, Request, most_alive, plan_memory

PARTS, UNITS = 32, (1, 2, 3, 4)
"""Into how many units a sequence is divided, and of how many the rehearsals are: under a third of a step together."""

_EXACT = 5e-4
"""Of a size, by which rounding may move it: a row of some thousands."""

_ALIKE = 0.02
"""Within which a size is in proportion to the square."""

_ROUNDED = 0.05
"""Of a size in proportion to the tokens, that may be a run's last token: above, something else decides."""

_PLACED = 1e-3
"""Of what is alive at the fullest step: a tensor below it is not placed by itself."""


class Change(NamedTuple):
    """Memory is asked for or given up."""

    address: int
    """Or whatever tells it from all other that is there at this moment."""
    size: int
    """Bytes, below 0 where it is given up."""
    what: str = ""
    """That asks for it, where that is known."""


@dataclass
class Trace:
    """Of one step, on one device."""

    resident: int = 0
    """Bytes that were there when it began."""
    changes: list[Change] = field(default_factory=list)
    failure: str = ""
    """Why nothing could be traced."""

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        stays, requests = lifetimes(self)
        return stays + most_alive(requests)


class Lifetimes(NamedTuple):
    stays: int
    """Bytes that are there before the step and all through it."""
    requests: list[Request]
    """Those that were there before, by size, and in the order in which they were asked for; times are changes' places.
    """


@dataclass(frozen=True)
class Forecast:
    """Bytes of a step."""

    resident: int = 0
    """There before it."""
    peak: int = 0
    """At the fullest moment, with what is left of those."""
    requests: list[Request] = field(default_factory=list)
    """None where nothing is known but the peak, or not that."""
    notice: str = ""
    """What is not sure about it, or why nothing is known."""


def lifetimes(trace: Trace) -> Lifetimes:
    """What memory was asked for during a step, and until when."""
    stays, end = trace.resident, max(0, len(trace.changes) - 1)
    before: list[Request] = []
    asked: list[Request] = []
    alive: dict[int, int] = {}
    """By address, the place in `asked`."""
    for now, (address, size, what) in enumerate(trace.changes):
        if address in alive:
            at = alive.pop(address)
            asked[at] = asked[at]._replace(last=now - 1)
        elif size >= 0:
            alive[address] = len(asked)
            asked.append(Request(f"{len(asked)} {what}".rstrip(), size, now, end))
        elif now:
            stays += size
            before.append(Request(f"before {len(before)}", -size, 0, now - 1))
        else:
            stays += size
    # Threads give memory up now before, now after one another; sizes are told apart better.
    return Lifetimes(stays, sorted(before, key=lambda one: -one.size) + asked)


def lengths_of(sequence: int, grain: int) -> list[int]:
    """Tokens of each rehearsal, multiples of `grain`; the sequence itself where it is too short to be shortened.

    What the first asks for tells nothing: workspaces are made once, and some buffers whenever a longer step comes.
    """
    unit = ceil(sequence / PARTS / grain) * grain
    lengths = [units * unit for units in UNITS]
    return lengths if lengths[-1] < sequence / 2 else [unit, sequence]


def forecast(traces: Sequence[tuple[int, Trace]], sequence: int) -> Forecast:
    """Of a step at `sequence` tokens, by the traces of steps at other lengths, ascending; or by its own."""
    if failed := next((trace.failure for _, trace in traces if trace.failure), ""):
        return Forecast(notice=failed)
    found = [lifetimes(trace) for _, trace in traces]
    lengths = [length for length, _ in traces]
    if lengths == [sequence]:
        return Forecast(traces[0][1].resident, traces[0][1].peak, [one for one in found[0].requests if one.size])
    resident = _continued(lengths, [trace.resident for _, trace in traces], sequence)
    stays = _continued(lengths, [each.stays for each in found], sequence)
    counts = [len(each.requests) for each in found]
    if len(set(counts)) > 1:
        peaks = [most_alive(each.requests) for each in found]
        peak = stays + _continued(lengths, peaks, sequence)
        text = f"steps of {_listed(lengths)} tokens ask for memory {_listed(counts)} times"
        return Forecast(resident, peak, notice=f"{text}, so that only their peaks are compared")
    requests, averaged = [], 0
    for same in zip(*(each.requests for each in found), strict=True):
        size, is_average = extrapolated(lengths, [one.size for one in same], sequence)
        if size:
            requests.append(same[-1]._replace(size=size))
        averaged += size * is_average
    notice = ""
    if averaged:
        share = averaged / sum(one.size for one in requests)
        notice = f"{share:.1%} of the bytes asked for do not follow from the length, and are told by their average"
    return Forecast(resident, stays + most_alive(requests), requests, notice)


def _continued(lengths: Sequence[int], sizes: Sequence[int], length: int) -> int:
    """Of sums, which have a part that does not grow: on the line from the first to the last."""
    slope = (sizes[-1] - sizes[0]) / (lengths[-1] - lengths[0])
    return round(sizes[-1] + slope * (length - lengths[-1]))


class Extrapolated(NamedTuple):
    size: int
    is_average: bool
    """The sizes fit no rule, and as many bytes a token are told as there are on the average."""


def extrapolated(lengths: Sequence[int], sizes: Sequence[int], length: int) -> Extrapolated:
    """The size at `length`, from three sizes at three lengths, ascending."""
    (short, middle, long), (least, between, most) = lengths, sizes
    slope = (most - least) / (long - short)
    if abs(least + slope * (middle - short) - between) <= _EXACT * between:
        return Extrapolated(max(0, round(least + slope * (length - short))), False)
    if most and all(abs(size * long**2 / (most * at**2) - 1) < _ALIKE for at, size in zip(lengths, sizes, strict=True)):
        return Extrapolated(round(most * (length / long) ** 2), False)
    rate = sum(sizes) / sum(lengths)
    is_average = any(abs(size - rate * at) > _ROUNDED * rate * at for at, size in zip(lengths, sizes, strict=True))
    return Extrapolated(round(rate * length), is_average)


def placed(requests: Sequence[Request]) -> tuple[list[Request], MemoryPlan]:
    """Those that are given an address, and the plan: the largest, and the others as one request of all the step.

    What is alive at the fullest step of all requests is the plan's bound.
    """
    bound = most_alive(requests)
    least = _PLACED * bound
    order = sorted(requests, key=lambda one: -one.size)
    large = [one for one in order if one.size >= least]
    if small := order[len(large) :]:
        end = max(one.last for one in requests)
        large.append(Request(f"{len(small):,} smaller ones", most_alive(small), 0, end))
    large.sort(key=lambda one: one.first)
    return large, replace(plan_memory(large), bound=bound)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)
