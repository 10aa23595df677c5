"""Static placement of tensors whose lifetimes are known: an address for each, and the memory that all need at most.

Both levels of MEMO (arXiv 2407.12117) in one: minimise M such that every address + size <= M and tensors that are alive
at once share no byte. This is dynamic storage allocation, NP-hard; what is alive at the fullest step is a lower bound.
Tensors are placed one by one in several orders; then those that end above the bound are placed earlier, again and again
(squeaky wheel optimisation, Joslin and Clements 1999); on a gap CP-SAT packs rectangles of time and address.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import NamedTuple

from jobs.errors import InputError

ALIGNMENT = 512
"""Bytes of which every address is a multiple, as of torch's caching allocator."""

_PLACEMENTS = 40_000
"""Tensors placed again at most, of all rounds together: 100 rounds of 400, 10 of 4,000."""

_ORDERED_AT_MOST = 5_000
"""Tensors that are placed in any order, seconds each time; of more only those alive are looked at, as they are made."""

_SOLVED_AT_MOST = 150
"""Tensors that CP-SAT is asked about: of 100 it meets the bound in ten seconds, of 400 it gains 0.1% in two minutes."""


class Request(NamedTuple):
    """A tensor of a traced step: `size` bytes from step `first`, which makes it, to `last`, which reads it last."""

    name: str
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class MemoryPlan:
    """Where each tensor lies. Sizes and addresses are multiples of ALIGNMENT, bytes."""

    addresses: dict[str, int]
    peak: int
    bound: int
    """That no placement is below: what is alive at the fullest step, or more where CP-SAT proved it."""
    method: str
    """That found it: `greedy` or `cp-sat`."""
    notice: str = ""
    """Why nothing better was looked for, where a gap is left."""

    @property
    def gap(self) -> float:
        """Share of the bound by which the peak exceeds it; 0: as small as can be."""
        return self.peak / self.bound - 1 if self.bound else 0.0


def aligned(size: int) -> int:
    """The multiple of ALIGNMENT that holds so many bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def most_alive(requests: Iterable[Request]) -> int:
    """Bytes, each tensor's aligned, that are alive at the fullest step."""
    changes: Counter[int] = Counter()
    for request in requests:
        changes[request.first] += aligned(request.size)
        changes[request.last + 1] -= aligned(request.size)
    return max(accumulate(changes[step] for step in sorted(changes)), default=0)


def plan_memory(requests: Sequence[Request], effort: float = 1.0) -> MemoryPlan:
    """Addresses of tensors, the same for the same requests.

    effort: CP-SAT's deterministic time, where a gap is left: 1 takes some seconds for 100 tensors; 0 leaves it
    out. It needs ortools; without, the greedy plan says so. InputError for a tensor of no bytes, one that ends before
    it begins, or two of one name.
    """
    _check(requests)
    bound = most_alive(requests)
    peak, addresses = _greedy(requests, bound)
    plan = MemoryPlan(addresses, peak, bound, "greedy")
    if peak == bound or effort == 0:
        return plan
    if len(requests) > _SOLVED_AT_MOST:
        return _told(plan, f"CP-SAT is not asked about {len(requests):,} tensors, {_SOLVED_AT_MOST:,} at most")
    return _solved(requests, plan, effort)


def _check(requests: Sequence[Request]) -> None:
    names: set[str] = set()
    for name, size, first, last in requests:
        if size < 1:
            raise InputError(f"requests.{name}.size", size, "a tensor has at least one byte", 1)
        if last < first:
            raise InputError(f"requests.{name}.last", last, f"is not before first={first}", first)
        if name in names:
            raise InputError("requests", name, "two tensors have this name")
        names.add(name)


_Order = Callable[[Request], tuple[int, ...]]


def _as_made(one: Request) -> tuple[int, ...]:
    """Of nested lifetimes a stack, which meets the bound."""
    return one.first, -one.last


_ORDERS: tuple[_Order, ...] = (
    lambda one: (-one.size, one.first),
    lambda one: (-one.size * (one.last - one.first + 1), one.first),
    _as_made,
    lambda one: (one.first - one.last, -one.size),
)


class _Found(NamedTuple):
    peak: int
    addresses: dict[str, int]


def _greedy(requests: Sequence[Request], bound: int) -> _Found:
    """The best of the orders, each by the first and by the tightest gap; improved while it is above the bound."""
    best = _Found(-1, {})
    best_order, best_tightest = list(requests), False
    many = len(requests) > _ORDERED_AT_MOST
    for key in (_as_made,) if many else _ORDERS:
        order = sorted(requests, key=key)
        for tightest in (False, True):
            found = place(order, tightest, as_made=key is _as_made)
            if best.peak < 0 or found.peak < best.peak:
                best, best_order, best_tightest = found, order, tightest
            if best.peak == bound:
                return best
    if many:
        return best
    found, order, random = best, best_order, Random(1)
    for number in range(_PLACEMENTS // len(requests)):
        # A wide and a narrow choice of whom to blame by turns, and now and then by chance how far they move: else the
        # orders soon go in a circle.
        above = best.peak - 1 if number % 2 else bound
        ranks = [
            at * (random.random() if number % 4 == 3 else 0.5)
            if found.addresses[one.name] + aligned(one.size) > above
            else float(at)
            for at, one in enumerate(order)
        ]
        order = [one for _, one in sorted(zip(ranks, order, strict=True), key=lambda pair: pair[0])]
        found = place(order, best_tightest)
        if found.peak < best.peak:
            best = found
        if best.peak == bound:
            break
    return best


def place(order: Iterable[Request], tightest: bool = False, *, as_made: bool = False) -> _Found:
    """Peak and addresses, each tensor in turn at the lowest address where it fits; or in the tightest gap.

    as_made: the order is one of times, so that what has been read last is in nobody's way any more.
    """
    placed: list[tuple[int, int, int, int]] = []
    addresses: dict[str, int] = {}
    peak = 0
    for name, unaligned, first, last in order:
        size = aligned(unaligned)
        free, chosen, slack = 0, -1, 0
        if as_made:
            placed = [each for each in placed if each[3] >= first]
        for start, end, made, read in placed:
            if made > last or read < first:
                continue
            left = start - free - size
            if left >= 0 and (chosen < 0 or left < slack):
                chosen, slack = free, left
                if not tightest or left == 0:
                    break
            if end > free:
                free = end
        at = free if chosen < 0 else chosen
        addresses[name] = at
        insort(placed, (at, at + size, first, last))
        peak = max(peak, at + size)
    return _Found(peak, addresses)


def _told(plan: MemoryPlan, why: str) -> MemoryPlan:
    notice = f"{why}: {plan.peak:,} bytes are {plan.gap:.2%} above the bound of {plan.bound:,}"
    return MemoryPlan(plan.addresses, plan.peak, plan.bound, plan.method, notice)


def _solved(requests: Sequence[Request], greedy: MemoryPlan, effort: float) -> MemoryPlan:
    """By CP-SAT from the greedy plan on; one worker, one seed and its own clock: equal input gives equal plans."""
    try:
        from ortools.sat.python import cp_model
    except ModuleNotFoundError:
        return _told(greedy, "ortools is not installed")
    model = cp_model.CpModel()
    highest = greedy.peak // ALIGNMENT
    peak = model.new_int_var(greedy.bound // ALIGNMENT, highest, "peak")
    places, times, ranges = {}, [], []
    for name, size, first, last in requests:
        height = aligned(size) // ALIGNMENT
        places[name] = model.new_int_var(0, highest - height, name)
        model.add(places[name] + height <= peak)
        model.add_hint(places[name], greedy.addresses[name] // ALIGNMENT)
        times.append(model.new_fixed_size_interval_var(first, last - first + 1, name))
        ranges.append(model.new_fixed_size_interval_var(places[name], height, name))
    model.add_hint(peak, highest)
    model.add_no_overlap_2d(times, ranges)
    model.minimize(peak)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = effort
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return _told(greedy, "CP-SAT found nothing in the effort it was given")
    bound = max(greedy.bound, round(solver.best_objective_bound) * ALIGNMENT)
    found = round(solver.objective_value) * ALIGNMENT
    if found == greedy.peak:
        plan = MemoryPlan(greedy.addresses, greedy.peak, bound, "greedy")
    else:
        plan = MemoryPlan({name: solver.value(at) * ALIGNMENT for name, at in places.items()}, found, bound, "cp-sat")
    return plan if plan.gap == 0 else _told(plan, "CP-SAT ended with the effort it was given")
