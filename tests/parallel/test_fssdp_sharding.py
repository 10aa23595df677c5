"""Who owns which experts: equally many a rank, and moved where that saves much."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.fssdp import Limits
from parallel.fssdp_dispatch import Topology, peak
from parallel.fssdp_sharding import SAVING, Move, moves, reshard
from parallel.placement import Placement

PLENTY = 1000


def zipf_layers(layers: int, experts: int, seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    found = []
    for _ in range(layers):
        loads = [1e5 / (place + 1) for place in range(experts)]
        draw.shuffle(loads)
        found.append(loads)
    return found


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(1, 12), st.data())
def test_all_own_equally_many_experts(
    layers: int, ranks: int, per_node: int, experts: int, data: st.DataObject
) -> None:
    owner = st.integers(0, ranks - 1)
    current = [
        Placement.sharded(data.draw(st.lists(owner, min_size=experts, max_size=experts)), ranks) for _ in range(layers)
    ]
    load = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    loads = data.draw(st.lists(load, min_size=layers, max_size=layers))
    found = reshard(current, loads, Topology(ranks, per_node), Limits(0, 0))
    before, after = (
        sum(peak(layer, of) for layer, of in zip(placements, loads, strict=True)) for placements in (current, found)
    )
    if found == tuple(current):
        assert list(moves(current, found)) == []
        return
    assert after <= before * (1 - SAVING)
    owned = [sum(len(layer.held_by(rank)) for layer in found) for rank in range(ranks)]
    assert max(owned) - min(owned) <= 1
    moved = list(map(list, ([held[0] for held in layer.holders] for layer in current)))
    for move in moves(current, found):
        assert moved[move.layer][move.expert] == move.sender != move.receiver
        moved[move.layer][move.expert] = move.receiver
    assert found == tuple(Placement.sharded(layer, ranks) for layer in moved)


def test_experts_move_where_it_saves_much() -> None:
    current = [Placement.even(4, 2)] * 2
    loads = [[10, 10, 1, 1], [1, 1, 1, 1]]
    found = reshard(current, loads, Topology(2, 2), Limits(0, 0))
    assert [peak(layer, of) for layer, of in zip(found, loads, strict=True)] == [11, 2]
    assert list(moves(current, found)) == [Move(0, 1, 0, 1), Move(0, 3, 1, 0)]
    assert reshard(found, loads, Topology(2, 2), Limits(0, 0)) == found


def test_experts_stay_where_copies_do_as_well_or_loads_are_nearly_even() -> None:
    current, topology = [Placement.even(64, 32)] * 4, Topology(32, 8)
    assert reshard(current, zipf_layers(4, 64, 0), topology, Limits(3, PLENTY)) == tuple(current)
    even = [[100 + (expert + layer) % 4 for expert in range(64)] for layer in range(4)]
    assert reshard(current, even, topology, Limits(0, 0)) == tuple(current)


def test_a_shard_may_hold_no_expert_of_a_layer() -> None:
    current, topology, none = [Placement.even(64, 8)] * 8, Topology(8, 4), Limits(0, 0)
    loads = zipf_layers(8, 64, 1)
    found = reshard(current, loads, topology, none)
    counts = {len(layer.held_by(rank)) for layer in found for rank in range(8)}
    assert len(counts) > 3
    moved = list(moves(current, found))
    assert 0 < len(moved) < 8 * 64 / 2
    drifted = [[load * (1 + 0.01 * (place % 3)) for place, load in enumerate(layer)] for layer in loads]
    assert reshard(found, drifted, topology, none) == found
