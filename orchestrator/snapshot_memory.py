"""The memory of one rank's snapshots: two places, so that one is always whole, each with a header that is written last.

A rank fills it and its node agent keeps it, by a descriptor; the agent of another node may hold a copy.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

PLACES = 2
_PAGE = 4096
_HEADER = struct.Struct("<qqq32s")
UNSUMMED = -1
"""For a checksum: the content is whole, and its checksum is still computed."""


class Header(NamedTuple):
    """What a place holds. Step -1: nothing that is whole."""

    step: int
    length: int
    """Bytes of content."""
    checksum: int
    """Of the content, as worker/snapshots.py computes it; or UNSUMMED."""
    owner: bytes
    """32 bytes, equal where the state means the same."""


NOTHING = Header(-1, 0, 0, bytes(32))


def size_for(length: int) -> int:
    """Bytes of a memory whose places have room for `length`."""
    return _PAGE + PLACES * -(-length // _PAGE) * _PAGE


def room(size: int) -> int:
    """Bytes of content that a place has room for, in a memory of `size` bytes."""
    return max(0, size - _PAGE) // PLACES


def start(size: int, place: int) -> int:
    """Where the content of a place begins."""
    return _PAGE + place * room(size)


def headers(memory: int) -> list[Header]:
    """Of each place of the memory behind this descriptor; empty where it has no places yet."""
    page = os.pread(memory, PLACES * _HEADER.size, 0)
    if len(page) < PLACES * _HEADER.size:
        return []
    return [Header(*fields) for fields in _HEADER.iter_unpack(page)]


def write_header(memory: int, place: int, header: Header) -> None:
    os.pwrite(memory, _HEADER.pack(*header), place * _HEADER.size)


def forget_from(memory: int, step: int) -> None:
    """Nothing of this step or later is whole any more."""
    for place, header in enumerate(headers(memory)):
        if header.step >= step:
            write_header(memory, place, NOTHING)
