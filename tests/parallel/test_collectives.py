"""Experts reach whoever is to hold them bit by bit, and gradients their owners, whatever the placement."""

from __future__ import annotations

import random
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.worker.ranks import Ranks
from parallel.collectives import Lane, spreads
from parallel.placement import Placement

SHAPES = ((6, 5), (5, 3))


def drawn(world: int, number: int) -> tuple[Placement, Placement]:
    """Owners of up to nine experts, some ranks of none, and copies of them: few, many or all."""
    draw = random.Random(100 * world + number)
    owners = [draw.randrange(world) for _ in range(draw.randint(1, 9))]
    share = draw.choice((0.0, 0.2, 0.6, 1.0))
    placed = ([owner, *(rank for rank in range(world) if draw.random() < share)] for owner in owners)
    return Placement.sharded(owners, world), Placement.of(world, placed)


def tensors(expert: int, rank: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1000 * expert + rank)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in SHAPES]


def _carried(rank: int, world: int, cases: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """All cases at once; how much each sent of weights and of gradients."""
    lane = Lane(dist.group.WORLD, dist.new_group(list(range(world))), torch.device("cpu"))
    begun = []
    for number in range(cases):
        sharded, placed = drawn(world, number)
        spread = spreads(sharded, placed)
        received = [expert for expert, (_, to) in spread.items() if rank in to]
        owned = [expert for expert, (owner, _) in spread.items() if owner == rank]
        held = {expert: tensors(expert, 0, dtype) for expert in owned}
        into = {expert: [torch.full(shape, torch.nan, dtype=dtype) for shape in SHAPES] for expert in received}
        gradients = {expert: tensors(expert, 1 + rank, dtype) for expert in received}
        sums = {expert: [torch.full(shape, torch.nan, dtype=dtype) for shape in SHAPES] for expert in owned}
        there = lane.all_gather(spread, held, into)
        back = lane.reduce_scatter(spread, gradients, sums)
        begun.append((spread, there, into, back, sums))
    sent = []
    for spread, there, into, back, sums in reversed(begun):  # whichever is waited for first
        back.wait()
        there.wait()
        for expert, found in into.items():
            assert all(map(torch.equal, found, tensors(expert, 0, dtype)))
        for expert, found in sums.items():
            parts = [tensors(expert, 1 + receiver, dtype) for receiver in spread[expert].receivers]
            for total, of_one in zip(found, zip(*parts, strict=True), strict=True):
                precise = torch.promote_types(dtype, torch.float32)
                expected = of_one[0].to(precise)
                for part in of_one[1:]:
                    expected = expected + part
                assert torch.equal(total, expected.to(dtype))
        sent.append((there.sent, back.sent))
    return sent[::-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_copies_are_the_owners_and_sums_the_holders_at_the_volume_that_is_promised(
    ranks: Ranks, world: int, dtype: torch.dtype
) -> None:
    cases = 12
    sent = ranks.run(world, _carried, world, cases, dtype)
    for number in range(cases):
        _, placed = drawn(world, number)
        volume = placed.copies * sum(a * b for a, b in SHAPES)
        assert [sum(rank[number][way] for rank in sent) for way in range(2)] == [volume, volume]


def test_an_owner_sends_an_expert_once_however_many_copies_it_has(ranks: Ranks) -> None:
    sent = ranks.run(4, _one_expert_for_all)
    size = sum(a * b for a, b in SHAPES)
    assert sent[0] == size
    assert max(sent[1:]) <= size
    assert sum(sent) == 3 * size


def test_what_has_come_is_let_go_of_by_whoever_still_knows_that_it_was_sent(ranks: Ranks) -> None:
    assert ranks.run(2, _kept_after_waiting) == [False, False]


def _kept_after_waiting(rank: int) -> bool:
    lane = Lane(dist.group.WORLD, dist.new_group([0, 1]), torch.device("cpu"))
    spread = spreads(Placement.sharded([0], 2), Placement(2, ((0, 1),)))
    gradients = tensors(0, rank, torch.float32)
    pending = lane.reduce_scatter(spread, {0: gradients}, {0: gradients})
    messages = [weakref.ref(message) for message in pending._messages]
    pending.wait()
    lane.all_gather({}, {}, {}).wait()  # and the lane's thread has let go of what it ran before
    return bool(messages) and any(message() is not None for message in messages)


def _one_expert_for_all(rank: int) -> int:
    lane = Lane(dist.group.WORLD, dist.new_group([0, 1, 2, 3]), torch.device("cpu"))
    spread = spreads(Placement.sharded([0], 4), Placement(4, ((0, 1, 2, 3),)))
    mine = tensors(0, rank, torch.float32)
    pending = lane.all_gather(spread, {0: mine}, {0: mine})
    pending.wait()
    assert all(map(torch.equal, mine, tensors(0, 0, torch.float32)))
    return pending.sent
