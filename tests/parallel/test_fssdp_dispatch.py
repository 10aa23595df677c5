"""Who computes which tokens, beside the rule carried out a token at a time and the most even division there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placements import least_peak

from parallel.fssdp_dispatch import Topology, computed, divide, quotas
from parallel.fssdp_journeys import journeys
from parallel.placement import Placement


@st.composite
def dispatches(draw: st.DrawFn) -> tuple[Placement, Topology, list[list[int]]]:
    topology = Topology(draw(st.integers(1, 9)), draw(st.integers(1, 4)))
    ranks = st.integers(0, topology.ranks - 1)
    holders = draw(st.lists(st.sets(ranks, min_size=1), min_size=1, max_size=6))
    counts = st.lists(st.integers(0, 50), min_size=len(holders), max_size=len(holders))
    tokens = draw(st.lists(counts, min_size=topology.ranks, max_size=topology.ranks))
    return Placement.of(topology.ranks, holders), topology, tokens


def destinations(
    placement: Placement, topology: Topology, tokens: Sequence[Sequence[int]], source: int
) -> list[list[tuple[int, int]]]:
    """By expert pairs of a rank, ascending, and how many tokens `source` sends there."""
    going = journeys(placement, topology, np.array(tokens), source).going.tolist()
    return [[(rank, number) for rank, number in enumerate(numbers) if number] for numbers in going]


def one_by_one(
    held: Sequence[int], limit: Sequence[int], counts: Sequence[int], topology: Topology
) -> Counter[tuple[int, int]]:
    """The rule, for one expert, with a token and a place at a time: how many go from whom to whom."""
    asking = [rank for rank, number in enumerate(counts) for _ in range(number)]
    places = [rank for rank, number in zip(held, limit, strict=True) for _ in range(number)]
    met: Counter[tuple[int, int]] = Counter()

    def meet(senders: Iterable[int], receivers: Iterable[int]) -> None:
        for pair in zip(list(senders), list(receivers), strict=False):
            met[pair] += 1
            asking.remove(pair[0])
            places.remove(pair[1])

    for rank in range(topology.ranks):
        meet([each for each in asking if each == rank], [each for each in places if each == rank])
    for node in range(topology.nodes):
        near = [each for each in asking if topology.node(each) == node]
        room = [each for each in places if topology.node(each) == node]
        stay = min(len(near), len(room))
        # Of equally spaced tokens each stays, so that of each rank a like part does.
        chosen = [each for at, each in enumerate(near) if (at + 1) * stay // len(near) > at * stay // len(near)]
        meet(chosen, room)
    meet(asking, places)
    assert not asking + places
    return met


@settings(deadline=None)
@given(dispatches())
def test_each_rank_knows_what_the_others_send_it(drawn: tuple[Placement, Topology, list[list[int]]]) -> None:
    placement, topology, tokens = drawn
    limits = quotas(placement, [sum(column) for column in zip(*tokens, strict=True)])
    met = [
        one_by_one(held, limit, [row[expert] for row in tokens], topology)
        for expert, (held, limit) in enumerate(zip(placement.holders, limits, strict=True))
    ]
    ranks = range(topology.ranks)
    for rank in ranks:
        going, coming = journeys(placement, topology, np.array(tokens), rank)
        assert going.tolist() == [[pairs[rank, other] for other in ranks] for pairs in met]
        held = placement.held_by(rank)
        assert coming.tolist() == [[met[expert][other, rank] for expert in held] for other in ranks]


@settings(deadline=None)
@given(dispatches())
def test_every_token_is_computed_once_by_a_holder(drawn: tuple[Placement, Topology, list[list[int]]]) -> None:
    placement, topology, tokens = drawn
    received = [[0] * placement.ranks for _ in placement.holders]
    for source, counts in enumerate(tokens):
        sent = destinations(placement, topology, tokens, source)
        assert [sum(number for _, number in pairs) for pairs in sent] == counts
        for expert, pairs in enumerate(sent):
            assert [rank for rank, _ in pairs] == sorted({rank for rank, _ in pairs})
            for rank, number in pairs:
                assert number > 0
                assert rank in placement.holders[expert]
                received[expert][rank] += number
    limits = quotas(placement, [sum(column) for column in zip(*tokens, strict=True)])
    for held, limit, got in zip(placement.holders, limits, received, strict=True):
        assert [got[rank] for rank in held] == limit
    assert computed(placement, tokens) == [sum(column) for column in zip(*received, strict=True)]


@settings(deadline=None)
@given(dispatches())
def test_no_token_leaves_its_rank_or_its_node_that_could_stay(
    drawn: tuple[Placement, Topology, list[list[int]]],
) -> None:
    placement, topology, tokens = drawn
    limits = quotas(placement, [sum(column) for column in zip(*tokens, strict=True)])
    sent = [destinations(placement, topology, tokens, source) for source in range(topology.ranks)]
    for expert, (held, limit) in enumerate(zip(placement.holders, limits, strict=True)):
        counts = [row[expert] for row in tokens]
        by_holder = dict(zip(held, limit, strict=True))
        for rank in held:
            assert dict(sent[rank][expert]).get(rank, 0) == min(counts[rank], by_holder[rank])
        for node in range(topology.nodes):
            ranks = topology.ranks_of(node)
            stayed = sum(number for rank in ranks for to, number in sent[rank][expert] if topology.node(to) == node)
            room = sum(by_holder.get(rank, 0) for rank in ranks)
            assert stayed == min(sum(counts[rank] for rank in ranks), room)


@settings(deadline=None)
@given(dispatches())
def test_the_division_is_as_even_as_the_holders_allow(drawn: tuple[Placement, Topology, list[list[int]]]) -> None:
    placement, _, tokens = drawn
    loads = [sum(column) for column in zip(*tokens, strict=True)]
    least = least_peak(placement, loads)
    division = divide(placement, loads)
    assert [sum(parts) for parts in division.taken] == pytest.approx(loads)
    assert least * (1 - 1e-9) <= max(division.by_rank) <= least * 1.01 + 1e-9
    assert max(computed(placement, tokens)) <= least * 1.01 + len(loads)


def test_those_who_send_beyond_their_node_send_alike() -> None:
    placement, topology = Placement.of(8, [[0, 4]]), Topology(8, 4)
    tokens = [[0], [100], [100], [100], [0], [0], [0], [0]]
    sent = [destinations(placement, topology, tokens, source)[0] for source in (1, 2, 3)]
    assert sent == [[(0, 50), (4, 50)]] * 3
