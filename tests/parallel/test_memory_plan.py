"""Placement of tensors in memory: what no plan may break, and how near the bound plans come."""

from __future__ import annotations

import io
import itertools
import sys
from random import Random
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from traces import step

from jobs.errors import InputError
from orchestrator.control.memory_picture import plot_memory
from parallel import memory_plan
from parallel.memory_plan import ALIGNMENT, MemoryPlan, Request, aligned, most_alive, place, plan_memory

TENSOR = st.tuples(st.integers(1, 20_000), st.integers(0, 15), st.integers(0, 15))


def requests(most: int) -> st.SearchStrategy[list[Request]]:
    def named(found: list[tuple[int, int, int]]) -> list[Request]:
        return [Request(f"t{n}", size, min(a, b), max(a, b)) for n, (size, a, b) in enumerate(found)]

    return st.lists(TENSOR, min_size=1, max_size=most).map(named)


def assert_valid(asked: list[Request], plan: MemoryPlan) -> None:
    assert set(plan.addresses) == {one.name for one in asked}
    assert all(address >= 0 and address % ALIGNMENT == 0 for address in plan.addresses.values())
    assert max(plan.addresses[one.name] + aligned(one.size) for one in asked) == plan.peak
    assert plan.peak >= plan.bound >= most_alive(asked)
    for one, other in itertools.combinations(asked, 2):
        if one.first <= other.last and other.first <= one.last:
            low, high = sorted((one, other), key=lambda each: plan.addresses[each.name])
            assert plan.addresses[low.name] + low.size <= plan.addresses[high.name]


@given(requests(40))
def test_tensors_that_live_at_once_share_no_byte_and_a_plan_repeats(asked: list[Request]) -> None:
    plan = plan_memory(asked, effort=0)
    assert_valid(asked, plan)
    assert plan == plan_memory(asked, effort=0)


@given(requests(40), st.booleans(), st.randoms(use_true_random=False))
def test_any_order_is_a_plan(asked: list[Request], tightest: bool, random: Random) -> None:
    random.shuffle(asked)
    peak, addresses = place(asked, tightest)
    assert_valid(asked, MemoryPlan(addresses, peak, most_alive(asked), "greedy"))


@given(requests(40), st.booleans())
def test_placed_as_made_what_is_over_is_in_nobodys_way(asked: list[Request], tightest: bool) -> None:
    asked.sort(key=lambda one: one.first)
    assert place(asked, tightest, as_made=True) == place(asked, tightest)


def test_very_many_tensors_are_placed_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "_ORDERED_AT_MOST", 100)
    asked = step(12)
    plan = plan_memory(asked, effort=0)
    assert_valid(asked, plan)
    assert plan.gap < 0.01


@settings(deadline=None)
@given(requests(6))
def test_few_tensors_are_placed_as_well_as_can_be(asked: list[Request]) -> None:
    # By address, the tensors of an optimal placement fall each to the lowest place left: an order by first fit.
    best = min(place(order).peak for order in itertools.permutations(asked))
    plan = plan_memory(asked)
    assert plan.peak == best
    assert_valid(asked, plan)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20_000)), min_size=1, max_size=40))
def test_a_stack_meets_the_bound(moves: list[tuple[bool, int]]) -> None:
    """Made and freed last in, first out, as forward and backward do."""
    stack: list[tuple[int, int]] = []
    asked: list[Request] = []
    for now, (free, size) in enumerate([*moves, *[(True, 1)] * len(moves)]):
        if free and stack:
            made, bytes_made = stack.pop()
            asked.append(Request(str(len(asked)), bytes_made, made, now))
        elif not free:
            stack.append((now, size))
    if asked:
        plan = plan_memory(asked, effort=0)
        assert plan.peak == plan.bound == most_alive(asked)
        assert plan.gap == 0
        assert plan.notice == ""


@settings(deadline=None, max_examples=25)
@given(requests(25))
def test_the_solver_is_never_worse_and_repeats(asked: list[Request]) -> None:
    greedy, plan = plan_memory(asked, effort=0), plan_memory(asked, effort=0.2)
    assert_valid(asked, plan)
    assert plan.peak <= greedy.peak
    assert plan == plan_memory(asked, effort=0.2)


def hard(count: int = 40) -> list[Request]:
    """Short lives at random, which leave holes."""
    random = Random(1)
    starts = [random.randrange(count) for _ in range(count)]
    return [
        Request(str(n), ALIGNMENT * random.randint(1, 2000), first, first + int(random.expovariate(1 / 8)))
        for n, first in enumerate(starts)
    ]


def test_without_the_solver_the_gap_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ortools", "ortools.sat", "ortools.sat.python"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(memory_plan, "_PLACEMENTS", 0)
    plan = plan_memory(hard())
    assert plan.method == "greedy"
    assert plan.gap > 0
    assert plan.notice.startswith(f"ortools is not installed: {plan.peak:,} bytes are ")
    assert plan.peak == plan_memory(hard(), effort=0).peak


def test_the_solver_closes_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "_PLACEMENTS", 0)
    plan = plan_memory(hard())
    assert (plan.method, plan.gap, plan.notice) == ("cp-sat", 0, "")
    assert_valid(hard(), plan)


def test_those_that_end_above_the_bound_are_placed_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    again = plan_memory(hard(), effort=0)
    monkeypatch.setattr(memory_plan, "_PLACEMENTS", 0)
    assert again.peak < plan_memory(hard(), effort=0).peak


@pytest.mark.parametrize(("layers", "tensors"), [(12, 400), (120, 4_000)])
def test_a_training_step_meets_the_bound_in_seconds(layers: int, tensors: int) -> None:
    asked = step(layers)
    assert len(asked) >= tensors
    started = perf_counter()
    plan = plan_memory(asked, effort=0)
    assert perf_counter() - started < 60
    assert plan.gap == 0


def test_many_tensors_are_not_given_to_the_solver() -> None:
    plan = plan_memory(hard(400))
    assert plan.notice.startswith("CP-SAT is not asked about 400 tensors, 150 at most: ")
    assert_valid(hard(400), plan)


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ([Request("a", 0, 0, 1)], "requests.a.size=0: a tensor has at least one byte; nearest valid: 1"),
        ([Request("a", 1, 2, 1)], "requests.a.last=1: is not before first=2; nearest valid: 2"),
        ([Request("a", 1, 0, 1)] * 2, "requests=a: two tensors have this name"),
    ],
)
def test_what_is_no_tensor(asked: list[Request], shown: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_memory(asked)
    assert str(caught.value) == shown


def test_nothing_takes_nothing() -> None:
    plan = plan_memory([])
    assert (plan.addresses, plan.peak, plan.bound, plan.gap) == ({}, 0, 0, 0)


def test_the_picture_shows_every_tensor() -> None:
    asked = [Request("a", 10**6, 0, 4), Request("b", 10**6, 2, 6)]
    image = io.BytesIO()
    plot_memory(asked, plan_memory(asked), image)
    seen = imread(io.BytesIO(image.getvalue()))[..., :3]
    for colour in ("4e79a7", "f28e2b"):
        wanted = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        assert np.isclose(seen, wanted, atol=0.01).all(axis=-1).sum() > 10_000
