"""Documents to rows: which pieces of documents lie together in a row of `length` places.

A place is a token and the token that follows it in its document, so a document of n tokens takes n - 1 places: its
first token is nobody's label and its last nobody's input. Documents that are longer than a row are cut into full rows
and a rest; rests and short documents stay whole and are packed best fit, longest first (fewer truncations improve
language modeling: Ding et al. 2024).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Row k holds the pieces bounds[k]..bounds[k + 1] - 1, in the order of the text; what is left of it is padding."""

    starts: np.ndarray
    """int64 [pieces]: the token that a piece begins with."""
    lengths: np.ndarray
    """int64 [pieces]: its places. Its tokens are one more."""
    bounds: np.ndarray
    """int64 [rows + 1]"""

    @property
    def rows(self) -> int:
        return len(self.bounds) - 1


def pack(ends: np.ndarray, first: int, last: int, length: int) -> Packing:
    """Pack the tokens first..last-1 of documents that end before token `ends[i]`; one that is cut there is two.

    Takes a few vectorised passes over the documents and a loop over the distinct lengths of pieces.
    """
    starts, lengths = _pieces(ends, first, last, length)
    rows = _best_fit(lengths, length)
    order = np.lexsort((starts, rows))
    counts = np.bincount(rows)
    return Packing(starts[order], lengths[order], np.concatenate([[0], np.cumsum(counts)]))


def _pieces(ends: np.ndarray, first: int, last: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the pieces of 1..length places that the documents fall into."""
    inner = ends[np.searchsorted(ends, first, side="right") : np.searchsorted(ends, last, side="left")]
    bounds = np.concatenate([[first], inner, [last]])
    places = np.maximum(np.diff(bounds) - 1, 0)
    counts = -(-places // length)
    document = np.repeat(np.arange(len(places)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    return bounds[document] + nth * length, np.minimum(places[document] - nth * length, length)


def _best_fit(lengths: np.ndarray, length: int) -> np.ndarray:
    """int64 [pieces]: the row of each piece, where each in turn, the longest first, goes where it leaves least room.

    Pieces of one length go into rows of one room all at once, so that the loop is over pairs of those and not over
    pieces.
    """
    rows = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    rooms: dict[int, list[tuple[int, int]]] = {}  # room -> ranges (first row, rows) that have it
    ascending: list[int] = []  # the rooms there are
    opened = placed = 0

    def leave(room: int, first: int, count: int) -> None:
        if room and count:
            if room not in rooms:
                bisect.insort(ascending, room)
            rooms.setdefault(room, []).append((first, count))

    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            at = bisect.bisect_left(ascending, size)
            if at == len(ascending):
                room, first, free = length, opened, -(-left // (length // size))
                opened += free
            else:
                room = ascending[at]
                first, free = rooms[room].pop()
                if not rooms[room]:
                    del rooms[room], ascending[at]
            each = room // size
            taken = min(left, free * each)
            used, over = divmod(taken, each)
            rows[order[placed : placed + taken]] = first + np.arange(taken) // each
            leave(room - each * size, first, used)
            if over:
                leave(room - over * size, first + used, 1)
                used += 1
            leave(room, first + used, free - used)
            placed += taken
            left -= taken
    return rows
