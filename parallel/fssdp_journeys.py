"""Which rank sends whom how many tokens of which expert: told by each rank alone, of the counts that all know.

The rule is `parallel.fssdp_dispatch`'s; here it is carried out once a layer and micro-batch, in arrays.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from parallel.fssdp_dispatch import Topology, quotas
from parallel.placement import Placement

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Journeys(NamedTuple):
    """Of the tokens that one rank sends and computes."""

    going: Numbers
    """[experts][ranks]: how many it sends where."""
    coming: Numbers
    """[ranks][experts that it holds, ascending]: how many it gets from where."""


def journeys(placement: Placement, topology: Topology, tokens: Numbers, rank: int) -> Journeys:
    """What `rank` sends and gets, of tokens [ranks][experts].

    Ranks that are asked one by one give each holder its quota, send every token once, and agree on who sends what.
    In whole numbers but for the quotas: a sum of floats might be another where arrays are added up in another order.
    """
    going = np.zeros((placement.experts, placement.ranks), np.int64)
    alone, holders = _alone(placement)
    going[alone, holders] = tokens[rank, alone]
    held = list(placement.held_by(rank))
    if placement.is_sharded:
        return Journeys(going, tokens[:, held])
    shared = _shared(placement)
    going[shared], come = _divided(placement, topology, tokens, rank)
    coming = tokens.copy()
    coming[:, shared] = come.T
    return Journeys(going, coming[:, held])


def _divided(placement: Placement, topology: Topology, tokens: Numbers, rank: int) -> tuple[Numbers, Numbers]:
    """Tokens of experts with several holders that `rank` sends to each rank and gets from each [experts][ranks]."""
    limits = quotas(placement, tokens.sum(0).tolist())
    node, at = divmod(rank, topology.ranks_per_node)
    shared = _shared(placement)
    by_node = (len(shared), topology.nodes, topology.ranks_per_node)
    # By expert and rank, the last node's filled up: tokens that have no holder yet, and how many more a holder takes.
    left, room = np.zeros((2, by_node[0], by_node[1] * by_node[2]), np.int64)
    left[:, : placement.ranks] = tokens[:, shared].T
    room[_sharers(placement)] = [number for limit in limits if len(limit) > 1 for number in limit]
    stay = np.minimum(left, room)
    left -= stay
    room -= stay
    going, coming = np.zeros((2, *left.shape), np.int64)
    going[:, rank] = coming[:, rank] = stay[:, rank]

    near = slice(node * by_node[2], (node + 1) * by_node[2])
    asked, places = _ends(left.reshape(by_node)), _ends(room.reshape(by_node))
    number = np.minimum(asked[..., -1:], places[..., -1:])
    # Each of a node's ranks keeps its part of what stays there, so that no one rank sends all that crosses.
    sent, taken = asked * number // np.maximum(asked[..., -1:], 1), np.minimum(places, number)
    going[:, near] += _dealt(sent[:, node], at, taken[:, node])
    coming[:, near] += _dealt(taken[:, node], at, sent[:, node])
    if topology.nodes > 1:
        left -= (sent[..., 1:] - sent[..., :-1]).reshape(left.shape)
        room -= (taken[..., 1:] - taken[..., :-1]).reshape(room.shape)
        beyond, free = _ends(left), _ends(room)
        going += _dealt(beyond, rank, free)
        coming += _dealt(free, rank, beyond)
    return going[:, : placement.ranks], coming[:, : placement.ranks]


def _ends(numbers: Numbers) -> Numbers:
    """[..., n] -> [..., n + 1]: 0, and where each ends if they follow one another."""
    ends = np.zeros((*numbers.shape[:-1], numbers.shape[-1] + 1), np.int64)
    np.cumsum(numbers, -1, out=ends[..., 1:])
    return ends


def _dealt(ends: Numbers, mine: int, others: Numbers) -> Numbers:
    """Tokens and places stand in two rows, and the first goes to the first: how many of mine meet those of each other.

    ends and others [experts][number + 1] of either row.
    """
    met: Numbers = np.minimum(np.maximum(others, ends[:, mine, None]), ends[:, mine + 1, None])
    return met[:, 1:] - met[:, :-1]


@lru_cache(maxsize=256)
def _alone(placement: Placement) -> tuple[Numbers, Numbers]:
    """Experts with one holder, ascending, and their holders."""
    found = [(expert, held[0]) for expert, held in enumerate(placement.holders) if len(held) == 1]
    experts, holders = np.array(found, np.int64).reshape(-1, 2).T
    return experts, holders


@lru_cache(maxsize=256)
def _shared(placement: Placement) -> Numbers:
    """Experts with several holders, ascending."""
    return np.array([expert for expert, held in enumerate(placement.holders) if len(held) > 1], np.int64)


@lru_cache(maxsize=256)
def _sharers(placement: Placement) -> tuple[Numbers, Numbers]:
    """Of each holder of each of `_shared`: the expert's number among these, and the holder."""
    several = [held for held in placement.holders if len(held) > 1]
    found = [(number, rank) for number, held in enumerate(several) for rank in held]
    numbers, ranks = np.array(found, np.int64).reshape(-1, 2).T
    return numbers, ranks
