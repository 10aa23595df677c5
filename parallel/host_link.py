"""Copies between a device and host memory beside what the device computes, and the host memory that they go to.

On a GPU a stream for each direction; for a CPU a thread for each, so that what has to be waited for is the same.
"""

from __future__ import annotations

import mmap
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Where to, where from: contiguous, of equal sizes."""


class Moment(Protocol):
    """Something that computation or a copy comes to."""

    def seconds_since(self, earlier: Moment) -> float:
        """Between two moments that have passed."""


class Link(Protocol):
    """Both directions between a device and its host."""

    def now(self) -> Moment:
        """Whatever the device has been asked to compute so far is done."""

    def copy(self, out: bool, pairs: Sequence[Pair], after: Iterable[Moment]) -> tuple[Moment, Moment]:
        """In turn with others of the direction, once all of `after` are past; out: to the host. Its begin and end."""

    def wait(self, moment: Moment) -> None:
        """What the device is asked to compute from here on comes after it."""


class CudaLink:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {out: torch.cuda.Stream(device) for out in (True, False)}

    def now(self) -> _CudaMoment:
        return _CudaMoment(torch.cuda.current_stream(self._device))

    def copy(self, out: bool, pairs: Sequence[Pair], after: Iterable[Any]) -> tuple[_CudaMoment, _CudaMoment]:
        stream = self._streams[out]
        for moment in after:
            stream.wait_event(moment.event)
        begin = _CudaMoment(stream)
        with torch.cuda.stream(stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        return begin, _CudaMoment(stream)

    def wait(self, moment: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(moment.event)


class _CudaMoment:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def seconds_since(self, earlier: Any) -> float:
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class ThreadLink:
    def __init__(self, delay: Callable[[], float] = lambda: 0.0) -> None:
        """delay: seconds by which a copy is late, asked before each."""
        self._delay = delay
        self._queues: dict[bool, SimpleQueue[_Work | None]] = {out: SimpleQueue() for out in (True, False)}
        for queue in self._queues.values():
            Thread(target=self._run, args=(queue,), daemon=True).start()

    def now(self) -> _ThreadMoment:
        moment = _ThreadMoment()
        moment.pass_()
        return moment

    def copy(self, out: bool, pairs: Sequence[Pair], after: Iterable[Any]) -> tuple[_ThreadMoment, _ThreadMoment]:
        begin, end = _ThreadMoment(), _ThreadMoment()
        self._queues[out].put((list(pairs), list(after), begin, end))
        return begin, end

    def wait(self, moment: Any) -> None:
        moment.passed.wait()

    def close(self) -> None:
        """No more copies follow."""
        for queue in self._queues.values():
            queue.put(None)

    def _run(self, queue: SimpleQueue[_Work | None]) -> None:
        while (work := queue.get()) is not None:
            pairs, after, begin, end = work
            del work
            for moment in after:
                moment.passed.wait()
            if late := self._delay():
                time.sleep(late)
            begin.pass_()
            while pairs:  # nothing is held while the next is waited for
                to, source = pairs.pop()
                to.copy_(source)
            to = source = None
            end.pass_()


class _ThreadMoment:
    def __init__(self) -> None:
        self.passed = Event()
        self.at = 0.0

    def pass_(self) -> None:
        self.at = time.perf_counter()
        self.passed.set()

    def seconds_since(self, earlier: Any) -> float:
        self.passed.wait()
        return self.at - float(earlier.at)


_Work = tuple[list[Pair], list[_ThreadMoment], _ThreadMoment, _ThreadMoment]


def link_of(device: torch.device) -> Link:
    return ThreadLink() if device.type == "cpu" else CudaLink(device)


class Block:
    """Host memory of one layer's copies."""

    def __init__(self, size: int, is_pinned: bool) -> None:
        # Pages of its own, since a page is pinned once; and not torch's pinned memory, which comes in powers of two.
        pages = mmap.mmap(-1, size)
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8)
        self.free: Moment | None = None
        """From when on it may be written to again."""
        self.discard: Callable[[], object] = _nothing
        if is_pinned:
            address = self.bytes.data_ptr()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
            self.discard = weakref.finalize(self, _unpin, address)
            self.discard.atexit = False


def _nothing() -> None:
    pass


def _unpin(address: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


class Slab:
    """A rank's share of host memory: blocks as layers need them, made once and used again in each step."""

    def __init__(self, limit: float, is_pinned: bool) -> None:
        """limit: bytes at most."""
        self.limit, self.size = limit, 0
        """Bytes at most, and of all blocks."""
        self._is_pinned = is_pinned
        self._free: list[Block] = []

    def take(self, size: int) -> Block | None:
        """A block of at least so many bytes; None where the limit, or the machine, leaves none."""
        fitting = [block for block in self._free if len(block.bytes) >= size]
        if fitting:
            # Of equal blocks the one that has been free for longest: its reload is most likely past.
            block = min(fitting, key=lambda each: len(each.bytes))
            self._free.remove(block)
            return block
        while self._free and self.size + size > self.limit:
            small = self._free.pop(0)
            small.discard()
            self.size -= len(small.bytes)
        if self.size + size > self.limit:
            return None
        try:
            block = Block(size, self._is_pinned)
        except (OSError, RuntimeError):  # the machine has less than was thought, or lets less of it be pinned
            self.limit = self.size
            return None
        self.size += size
        return block

    def give(self, block: Block, free: Moment) -> None:
        """Back, to be written to from then on."""
        block.free = free
        self._free.append(block)

    def discard(self) -> None:
        """Give up the blocks that nobody has taken."""
        while self._free:
            block = self._free.pop()
            block.discard()
            self.size -= len(block.bytes)
