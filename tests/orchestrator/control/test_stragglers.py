"""Who is called slow, and for what, of steps made by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.stragglers import WINDOW, Straggler, Stragglers, Timing
from parallel.layout import Layout

LAYOUT = Layout(tp=2, dp=2, pp=2, ep=2)
Make = Callable[[int, int, random.Random], tuple[float, float, float, float]]
"""Of (step, rank): seconds of data, of own compute, of delay on its link, and routed tokens over the mean."""


def told(make: Make, steps: int = 20, layout: Layout = LAYOUT, seed: int = 0) -> tuple[Straggler, ...]:
    """What is told after so many steps: whoever arrives last lets all others of its groups wait."""
    draw, stragglers = random.Random(seed), Stragglers(layout)
    found: tuple[Straggler, ...] = ()
    for step in range(steps):
        parts = {rank: make(step, rank, draw) for rank in range(layout.world)}
        timings = {}
        for rank, (data, compute, _, routed) in parts.items():
            waited = {}
            for axes in ("tp", "dp"):
                group = next(group for group in layout.groups(axes) if rank in group)
                last = max(parts[other][0] + parts[other][1] for other in group)
                waited[axes] = last - data - compute + 0.01 + max(parts[other][2] for other in group)
            timings[rank] = Timing(data, compute, waited, routed)
        found = stragglers.add_timings(timings)
    return found


def even(step: int, rank: int, draw: random.Random) -> tuple[float, float, float, float]:
    stage = 0.1 if rank < 4 else 0.15  # the last stage has the head
    long = 3.0 if step % 7 == 0 else 1.0  # some steps are long for all
    return 0.002 * draw.uniform(0.5, 2), long * stage * draw.gauss(1, 0.05), 0.0, 1.0


def test_nobody_is_slow_where_all_are_alike() -> None:
    for seed in range(10):
        assert told(even, 40, seed=seed) == ()


@pytest.mark.parametrize("factor", [1.2, 2.0])
@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_computes_slowly(rank: int, factor: float) -> None:
    def make(step: int, at: int, draw: random.Random) -> tuple[float, float, float, float]:
        data, compute, delay, routed = even(step, at, draw)
        return data, compute * (factor if at == rank else 1), delay, routed

    for seed in range(10):
        (found,) = told(make, seed=seed)
        assert (found.rank, found.cause) == (rank, "compute")
        assert found.slower == pytest.approx(factor - 1, rel=0.35)


def test_a_rank_that_turns_slow_is_told_within_20_steps() -> None:
    late = 0
    for seed in range(20):
        draw, stragglers = random.Random(seed), Stragglers(Layout(dp=2, ep=2))
        for step in range(70):
            own = [0.03 * draw.lognormvariate(0, 0.05) for _ in range(2)]
            own[1] *= 1.2 if step >= 50 else 1
            found = stragglers.add_timings({rank: Timing(0.0005, own[rank], {"dp": 0.01}) for rank in range(2)})
            assert step >= 50 or not found
        late += [(each.rank, each.cause) for each in found] != [(1, "compute")]
    assert late <= 1


@pytest.mark.parametrize("steps", [5, 9, 10])
def test_a_rank_that_is_slow_for_a_moment_is_not_told(steps: int) -> None:
    def make(step: int, rank: int, draw: random.Random) -> tuple[float, float, float, float]:
        data, compute, delay, routed = even(step, rank, draw)
        return data, compute * (1.5 if rank == 2 and 30 <= step < 30 + steps else 1), delay, routed

    assert not any(told(make, until) for until in range(30, 60, 2))


def test_a_rank_that_waits_for_its_data() -> None:
    def make(step: int, rank: int, draw: random.Random) -> tuple[float, float, float, float]:
        data, compute, delay, routed = even(step, rank, draw)
        return data + (0.05 if rank == 3 else 0), compute, delay, routed

    (found,) = told(make)
    assert (found.rank, found.cause) == (3, "data")
    assert found.lost == pytest.approx(0.05, rel=0.1)


def test_a_rank_whose_link_is_slow() -> None:
    def make(step: int, rank: int, draw: random.Random) -> tuple[float, float, float, float]:
        data, compute, _, routed = even(step, rank, draw)
        return data, compute, 0.08 if rank == 2 else 0.0, routed

    (found,) = told(make)
    assert (found.rank, found.cause) == (2, "network")


def test_a_rank_with_more_tokens_is_no_slow_machine() -> None:
    def make(step: int, rank: int, draw: random.Random) -> tuple[float, float, float, float]:
        data, compute, delay, _ = even(step, rank, draw)
        routed = draw.gauss(1.6 if rank == 1 else 0.8, 0.1)
        return data, compute + 0.06 * (routed - 1), delay, routed

    (found,) = told(make)
    assert (found.rank, found.cause) == (1, "routing")


def test_a_slow_machine_with_more_tokens_is_one() -> None:
    def make(step: int, rank: int, draw: random.Random) -> tuple[float, float, float, float]:
        data, compute, delay, _ = even(step, rank, draw)
        routed = draw.gauss(1.0, 0.3)
        return data, compute * (1.3 if rank == 1 else 1) + 0.06 * (routed - 1), delay, routed

    (found,) = told(make)
    assert (found.rank, found.cause) == (1, "compute")


@pytest.mark.parametrize("world", [2, 4])
def test_a_slow_machine_whose_experts_are_always_chosen_more_is_one(world: int) -> None:
    """Of few ranks one is a large part: its slowness is not to pass for what tokens cost."""

    def make(step: int, rank: int, draw: random.Random) -> tuple[float, float, float, float]:
        routed = draw.gauss(1.3 if rank == 0 else 0.9, 0.05)
        slow = 1.2 if rank == 0 else 1
        return 0.001, slow * (0.1 + 0.01 * (routed - 1)) * draw.gauss(1, 0.02), 0.0, routed

    found = [told(make, layout=Layout(dp=world, ep=2), seed=seed) for seed in range(10)]
    assert [[(each.rank, each.cause) for each in slow] for slow in found].count([(0, "compute")]) >= 9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.01, 0.3), world=st.sampled_from([2, 4, 8]))
def test_noise_alone_tells_of_nobody(seed: int, noise: float, world: int) -> None:
    def make(step: int, rank: int, draw: random.Random) -> tuple[float, float, float, float]:
        return 0.001, 0.1 * draw.lognormvariate(0, noise), 0.0, 1.0

    assert told(make, WINDOW + 10, Layout(dp=world), seed) == ()


def test_two_ranks_alone_are_told_apart() -> None:
    def make(step: int, rank: int, draw: random.Random) -> tuple[float, float, float, float]:
        return 0.001, (0.12 if rank else 0.1) * draw.gauss(1, 0.02), 0.0, 1.0

    (found,) = told(make, layout=Layout(dp=2))
    assert (found.rank, found.cause) == (1, "compute")
