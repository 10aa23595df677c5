"""What a rank does at this moment, on a page of memory that its node agent reads without asking.

A rank that is stopped, spins, or holds the interpreter's lock cannot answer; what it wrote last still stands here. The
page outlives the rank, for it is the agent's. Times are of the monotonic clock, which all processes of a node share.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal["start", "build", "restore", "data", "compute", "evaluate", "agree", "checkpoint", "end"]
"""start: until the process group stands; agree: whether anybody was asked to stop; the others are as they are named."""

_PHASES: tuple[Phase, ...] = get_args(Phase)
_PAGE = 4096
_COUNT = struct.Struct("<Q")
_BODY = struct.Struct("<QIqqQqQ64s")
_OVER = struct.Struct("<If")
_OVER_AT, _OVER_COUNT = 1024, 256
"""Where the last phases that are over stand, in a ring: a reader comes by less often than most of them change."""


@dataclass(frozen=True)
class Beat:
    """One reading of a page."""

    step: int
    """That it works on; 0 before the first."""
    phase: Phase
    since: float
    """Seconds, monotonic: when it entered the phase."""
    collectives: int
    """Begun since it started."""
    collective: str
    """The last one begun: its name and group, `all_reduce dp`; empty before the first."""
    collective_since: float
    """Seconds, monotonic."""
    in_collective: bool
    """Whether the last one has not ended."""
    over: tuple[tuple[Phase, float], ...] = ()
    """Phases that ended since the reading before, with the seconds that each took; at most the last 255."""


def new_page() -> int:
    """Descriptor of an anonymous page, to be inherited by a rank."""
    descriptor = os.memfd_create("fivefold-pulse")
    os.truncate(descriptor, _PAGE)
    return descriptor


class Pulse:
    """The rank's end: it alone writes. Nothing here waits, allocates much, or can fail."""

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, _PAGE)
        self._count = 0
        self._step, self._phase, self._since = 0, 0, time.monotonic_ns()
        self._collectives, self._name, self._called = 0, b"", 0
        self._inside, self._over = False, 0
        self._write()

    def enter(self, phase: Phase, step: int | None = None) -> None:
        now = time.monotonic_ns()
        # In the one place of the ring that no reader looks at before the count is raised.
        place = _OVER_AT + self._over % _OVER_COUNT * _OVER.size
        _OVER.pack_into(self._page, place, self._phase, (now - self._since) / 1e9)
        self._over += 1
        self._phase, self._since = _PHASES.index(phase), now
        if step is not None:
            self._step = step
        self._write()

    def collective(self, name: str) -> None:
        """One begins; up to 64 bytes of its name are kept."""
        self._collectives += 1
        self._name, self._called, self._inside = name.encode(), time.monotonic_ns(), True
        self._write()

    def collective_ended(self) -> None:
        self._inside = False
        self._write()

    def _write(self) -> None:
        # Odd while it is being written: a reader that sees that, or another count afterwards, reads again.
        self._count += 2
        _COUNT.pack_into(self._page, 0, self._count - 1)
        counts = self._collectives, int(self._inside), self._over
        fields = self._step, self._phase, self._since, self._called, *counts, self._name
        _BODY.pack_into(self._page, _COUNT.size, *fields)
        _COUNT.pack_into(self._page, 0, self._count)


class Pulses:
    """The agent's end of a page."""

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, _PAGE, prot=mmap.PROT_READ)
        self._read = 0

    def read(self) -> Beat | None:
        """The last beat; None before the first, and where the rank died in the middle of one."""
        for _ in range(1000):
            content = self._page[:]
            (before,), (after,) = _COUNT.unpack_from(content), _COUNT.unpack_from(self._page)
            if before == after and before and before % 2 == 0:
                return self._beat(content)
        return None

    def _beat(self, content: bytes) -> Beat:
        step, phase, since, called, collectives, inside, over, name = _BODY.unpack_from(content, _COUNT.size)
        ended = []
        for number in range(max(self._read, over - _OVER_COUNT + 1), over):
            which, seconds = _OVER.unpack_from(content, _OVER_AT + number % _OVER_COUNT * _OVER.size)
            ended.append((_PHASES[which], seconds))
        self._read = over
        text = name.rstrip(b"\0").decode(errors="replace")
        return Beat(step, _PHASES[phase], since / 1e9, collectives, text, called / 1e9, bool(inside), tuple(ended))
