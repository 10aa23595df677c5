"""Snapshots survive their node: each agent sends those of its ranks to one other node's agent, its peer.

What travels goes through Ray, which authenticates it and moves it between its nodes' stores.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator.messages import Event
from orchestrator.snapshot_memory import NOTHING, PLACES, UNSUMMED, Header, forget_from, headers, start, write_header

_LOOK_SECONDS = 0.5
_CHUNK_BYTES = 1 << 24
_AHEAD = 2
"""Chunks on their way at once."""


class Copies:
    """Both sides: what this node's peer keeps of `memories`, and what is kept here of another node's ranks."""

    def __init__(self, memories: dict[int, int], tell: Callable[[Event], None]) -> None:
        """memories: by rank, the descriptors of this node's snapshots, which grow while this is used."""
        self._memories, self._tell = memories, tell
        self._kept: dict[int, int] = {}
        self._peer: Any = None
        self._peer_name = ""
        self._sent: dict[int, list[Header]] = {}
        self._told = False
        self._thread = threading.Thread(target=self._keep_sending, daemon=True)

    def send_to(self, peer: Any, name: str) -> None:
        """From now on this agent, an actor of Ray's, holds the copies. It may have none yet."""
        self._peer, self._peer_name, self._sent, self._told = peer, name, {}, False
        if self._thread.ident is None:
            self._thread.start()

    def fetch(self, rank: int, memory: int) -> None:
        """Fill a rank's new memory from what the peer keeps of it: its node was lost, and this is in its place."""
        import ray

        if self._peer is None:
            return
        size, kept = ray.get(self._peer.kept.remote(rank))
        os.ftruncate(memory, size)
        for place, header in enumerate(kept):
            if header.step < 0:
                continue
            for offset, length in _chunks(size, place, header):
                os.pwrite(memory, ray.get(self._peer.read_copy.remote(rank, offset, length)), offset)
            write_header(memory, place, header)

    def keep(self, rank: int, size: int, content: bytes, offset: int) -> None:
        """A part of a rank's memory, as another node's agent sends it."""
        memory = self._of(rank)
        if os.fstat(memory).st_size != size:
            os.ftruncate(memory, 0)
            os.ftruncate(memory, size)
        os.pwrite(memory, content, offset)

    def keep_header(self, rank: int, place: int, header: Header) -> None:
        write_header(self._of(rank), place, header)

    def kept(self, rank: int) -> tuple[int, list[Header]]:
        """Bytes of a rank's copied memory, and what it holds."""
        memory = self._of(rank)
        return os.fstat(memory).st_size, headers(memory)

    def read(self, rank: int, offset: int, length: int) -> bytes:
        return os.pread(self._of(rank), length, offset)

    def forget_from(self, step: int) -> None:
        for memory in self._kept.values():
            forget_from(memory, step)

    def _of(self, rank: int) -> int:
        if rank not in self._kept:
            self._kept[rank] = os.memfd_create("fivefold-copies")
        return self._kept[rank]

    def _keep_sending(self) -> None:
        from ray.exceptions import RayError

        while True:
            time.sleep(_LOOK_SECONDS)
            peer = self._peer
            if peer is None:
                continue
            try:
                steps = [self._send(peer, rank, memory) for rank, memory in list(self._memories.items())]
            except RayError:  # the controller learns by itself that the peer is gone, and gives another
                self._peer = None if self._peer is peer else self._peer
                continue
            if (newest := max(steps, default=0)) and not self._told:
                self._told = True
                text = f"what ranks keep in memory is copied to {self._peer_name}, from step {newest} on"
                self._tell(Event(kind="snapshots_copied", message=text, data={"step": newest}))

    def _send(self, peer: Any, rank: int, memory: int) -> int:
        """Make the peer's copy equal; the newest step that was sent, 0 for none."""
        import ray

        newest = 0
        sent = self._sent.setdefault(rank, [NOTHING] * PLACES)
        for place, header in enumerate(headers(memory)):
            if header == sent[place] or header.checksum == UNSUMMED:
                continue
            size = os.fstat(memory).st_size
            ray.get(peer.keep_copy_header.remote(rank, place, NOTHING))
            sent[place] = NOTHING
            if header.step < 0:
                continue
            waiting: list[Any] = []
            for offset, length in _chunks(size, place, header):
                waiting.append(peer.keep_copy.remote(rank, size, os.pread(memory, length, offset), offset))
                if len(waiting) > _AHEAD:
                    ray.get(waiting.pop(0))
            ray.get(waiting)
            if headers(memory)[place : place + 1] != [header]:
                continue  # the rank writes there again
            ray.get(peer.keep_copy_header.remote(rank, place, header))
            sent[place], newest = header, max(newest, header.step)
        return newest


def _chunks(size: int, place: int, header: Header) -> list[tuple[int, int]]:
    """(offset in the memory, bytes) of the parts of what a place holds."""
    begin = start(size, place)
    end = begin + header.length
    return [(at, min(_CHUNK_BYTES, end - at)) for at in range(begin, end, _CHUNK_BYTES)]
