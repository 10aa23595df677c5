"""A rank's state in memory that its node agent owns: it outlives the rank, and the next attempt begins from it.

State changes in the optimizer's step alone. So a copy runs in a thread behind the next step's forward and backward.
What is not copied when these are done is set aside on the device, where their activations have left room, or waited
for: that is the only stall. There are two places, so that one is
always whole; what each holds is told by a header that is written last. The checksum, which takes longer than the copy,
follows, and is verified before use where it is there.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from orchestrator.messages import RankLaunch
from orchestrator.snapshot_memory import NOTHING, PLACES, UNSUMMED, Header, headers, room, size_for, start, write_header
from orchestrator.worker.engines.protocol import Engine
from orchestrator.worker.host_memory import available_bytes
from orchestrator.worker.reporter import Reporter

_COPIED_BYTES = 1 << 25
_TOUCHED_BYTES = 1 << 24
_SUMMED_BYTES = 1 << 28
"""At once. Each piece takes the interpreter's lock from the training thread a few times; of those copied see _Copy."""
_ALIGNED = 64
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14, which Python 3.11 has no name for."""
_MOVES_NO_STATE = {"micro_batch", "recompute", "recompute_modules", "context_attention", "dispatcher"}
"""What of a layout may change between two attempts with each rank's state staying as it is."""
_MOST_THREADS = 8
"""That compute one rank's checksums, at most; half of its share of the cores."""
_SHARE_OF_MEMORY = 0.8
"""Of what the node has free, that snapshots of its ranks may take."""


class _Copy:
    """Of a state to its place in memory, which may be made again and again: both stay where they are.

    From a device, piece by piece. Its link serves in order of arrival, whatever the stream: where a router tells the
    host its counts, in each layer, they wait for all that was queued before, which so is one piece at most.
    """

    def __init__(self, state: Sequence[torch.Tensor], views: Sequence[torch.Tensor]) -> None:
        self.length = _length(state)
        self._pieces: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        self._stream = torch.cuda.Stream() if any(tensor.is_cuda for tensor in state) else None
        self._lock = threading.Lock()
        self._next = 0
        """The first piece that is not queued; under the lock, as what is set aside."""
        self._aside: list[list[torch.Tensor]] = []
        free = 0
        for tensor, view in zip(state, views, strict=True):
            elements = _COPIED_BYTES // tensor.element_size()
            for source, target in zip(tensor.view(-1).split(elements), view.view(-1).split(elements), strict=True):
                size = source.numel() * source.element_size()
                if size > free:
                    self._pieces.append(([], []))
                    free = _COPIED_BYTES
                sources, targets = self._pieces[-1]
                sources.append(source)
                targets.append(target)
                free -= size

    def await_update(self) -> None:
        """On the training thread: what follows there is not copied."""
        self._next = 0
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def run(self) -> None:
        """Until all is copied; on any thread."""
        if self._stream is None:
            for sources, targets in self._pieces:
                torch._foreach_copy_(targets, sources)
            return
        copied = torch.cuda.Event(blocking=True)  # sleeps: the interpreter's lock is the training thread's
        with torch.cuda.stream(self._stream):
            for index, (sources, targets) in enumerate(self._pieces):
                with self._lock:
                    aside = self._aside.pop(0) if self._aside else sources
                    torch._foreach_copy_(targets, aside, non_blocking=True)
                    self._next = index + 1
                copied.record(self._stream)
                copied.synchronize()  # what was set aside is free after it

    @torch.no_grad()
    def set_aside(self) -> bool:
        """Whether the state may change at once, since the device had room for what is not copied yet.

        On the training thread. The room is what the step before has needed at its peak and is free now: half of it,
        since the update may want some.
        """
        if self._stream is None:
            return False
        with self._lock:
            left = [sources for sources, _ in self._pieces[self._next :]]
            wanted = sum(source.numel() * source.element_size() for sources in left for source in sources)
            if wanted > (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) // 2:
                return False
            self._aside = [[source.clone() for source in sources] for sources in left]
            training = torch.cuda.current_stream()
            training.wait_stream(self._stream)
            self._stream.wait_stream(training)
        return True


class Snapshots:
    """Made on every rank. `begin` after a step, `finish` before the next update; both on the training thread."""

    def __init__(self, launch: RankLaunch, memory_fd: int, reporter: Reporter) -> None:
        self._interval = launch.job.checkpoint.snapshot_interval
        self._launch, self._descriptor, self._reporter = launch, memory_fd, reporter
        self._owner = _owner(launch)
        self._memory: mmap.mmap | None = None
        self._size = 0
        self._pinned: set[int] = set()
        self._newest: int | None = None
        self._copies: dict[int, _Copy] = {}
        self._copying: _Copy | None = None
        cores = len(os.sched_getaffinity(0)) // launch.job.cluster.devices_per_node
        self._threads = max(1, min(cores // 2, _MOST_THREADS))
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self.stall_seconds = 0.0
        """That training waited for copies, since it was last set to 0."""

    @property
    def busy(self) -> bool:
        """Whether this rank could not begin: the one before is not whole yet, or its room is still being made."""
        return self._thread is not None and self._thread.is_alive()

    def settle(self) -> None:
        """Wait until it is not busy."""
        if self._thread is not None:
            self._thread.join()

    def restore(self, engine: Engine, above: int) -> int | None:
        """Collective. The newest step that every rank holds whole, once its state is the engine's; None for none.

        above: the step of the newest checkpoint, which is as good as a snapshot of the same.
        """
        state = engine.state() if self._interval else None
        fits = state is not None and self._fits(_length(state))
        places = {step: place for step, place in self._offered().items() if step > above}
        told: list[tuple[set[int], bool]] = [(set(), False)] * dist.get_world_size()
        dist.all_gather_object(told, (set(places), fits))
        common = sorted(set.intersection(*(steps for steps, _ in told)))
        while common and not self._all_whole(common[-1], places[common[-1]]):
            common.pop()
        if common:
            self._take_up(engine, common[-1], places[common[-1]])
        if state is not None and all(fit for _, fit in told):
            self._make_room(state)
        else:
            self._interval = 0
        return common[-1] if common else None

    def _all_whole(self, step: int, place: int) -> bool:
        """Collective. Whether each rank's snapshot of a step is what was written."""
        header = headers(self._descriptor)[place]
        whole = header.checksum in (UNSUMMED, self._checksum(place, header.length))
        if not whole:
            text = f"rank {self._launch.rank}'s snapshot of step {step} is damaged and left aside"
            self._reporter.event("snapshot_damaged", text, step=step)
        told = [False] * dist.get_world_size()
        dist.all_gather_object(told, whole)
        return all(told)

    def _take_up(self, engine: Engine, step: int, place: int) -> None:
        state = engine.state()
        assert state is not None
        on_device = any(tensor.is_cuda for tensor in state)
        if on_device:
            self._pin(place)
        for tensor, kept in zip(state, self._views(state, place), strict=True):
            tensor.copy_(kept, non_blocking=on_device)
        if on_device:
            torch.cuda.synchronize()
        engine.restored(step)
        if self._launch.rank == 0:
            text = f"the state of step {step} is restored from memory"
            self._reporter.event("snapshot_restored", text, step=step)

    @torch.no_grad()
    def begin(self, engine: Engine, step: int) -> None:
        """Copy the state after `step`, if one is due, behind what the caller does until `finish`.

        Not while any rank is busy: all hold the same steps, or there would be none to begin from.
        """
        newest = step - 1 if self._newest is None else self._newest
        if not self._interval or step // self._interval == newest // self._interval:
            return
        began = time.monotonic()
        self._newest, place = step, self._oldest()
        write_header(self._descriptor, place, NOTHING)
        if place not in self._copies:
            state = engine.state()
            assert state is not None
            self._copies[place] = _Copy(state, self._views(state, place))
        copy = self._copying = self._copies[place]
        copy.await_update()
        self._copied.clear()
        self._thread = threading.Thread(target=self._keep, args=(copy, place, step), daemon=True)
        self._thread.start()
        self.stall_seconds += time.monotonic() - began

    def finish(self) -> None:
        """After this the state may change, whatever of it `begin` still copies."""
        began = time.monotonic()
        if not self._copied.is_set() and not (self._copying and self._copying.set_aside()):
            self._copied.wait()
        self.stall_seconds += time.monotonic() - began

    @torch.no_grad()
    def _keep(self, copy: _Copy, place: int, step: int) -> None:
        try:
            copy.run()
            header = Header(step, copy.length, UNSUMMED, self._owner)
            write_header(self._descriptor, place, header)
        finally:  # whatever happened to the copy, training is not to wait for it
            self._copied.set()
        header = header._replace(checksum=self._checksum(place, copy.length))
        write_header(self._descriptor, place, header)

    def _fits(self, length: int) -> bool:
        """Whether this node has memory for the snapshots of all its ranks; told where it has not."""
        ranks = min(self._launch.job.cluster.devices_per_node, dist.get_world_size())
        each = 2 if self._launch.job.cluster.nodes > 1 else 1  # a node keeps another's too
        wanted = PLACES * length * ranks * each
        free = available_bytes() + os.fstat(self._descriptor).st_size * ranks * each
        if wanted <= _SHARE_OF_MEMORY * free:
            return True
        if self._launch.local_rank == 0:
            text = f"no snapshots: they would take {wanted / 1e9:.1f} GB of the node's {free / 1e9:.1f} GB free"
            self._reporter.event("snapshots_off", text, wanted_bytes=wanted, free_bytes=free)
        return False

    def _make_room(self, state: Sequence[torch.Tensor]) -> None:
        """Behind the first steps: a page's first touch takes longer than a copy, and pinning it longer still."""
        if self._memory is None or room(self._size) < _length(state):
            self._memory = None  # views of it may be alive for a while, and end with themselves
            os.ftruncate(self._descriptor, 0)  # what another layout left
            os.ftruncate(self._descriptor, size_for(_length(state)))
            for place in range(PLACES):
                write_header(self._descriptor, place, NOTHING)
            self._open()
        self._thread = threading.Thread(target=self._touch, args=(state[0].is_cuda,), daemon=True)
        self._thread.start()

    def _touch(self, pinned: bool) -> None:
        first, size = self._address(0), self._size
        madvise = ctypes.CDLL(None).madvise  # mmap's own keeps the interpreter's lock, and training waits for it

        def populate(at: int) -> None:  # an older kernel refuses, and its pages are made as they are written
            length = min(_TOUCHED_BYTES, size - at)
            madvise(ctypes.c_void_p(first + at), ctypes.c_size_t(length), _POPULATE_WRITE)

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(populate, range(0, size, _TOUCHED_BYTES)))
        for place in range(PLACES) if pinned else ():
            self._pin(place)

    def _pin(self, place: int) -> None:
        """The device copies there at its link's full speed then; where it is refused, more slowly."""
        if place not in self._pinned:
            torch.cuda.cudart().cudaHostRegister(self._address(start(self._size, place)), room(self._size), 0)
            self._pinned.add(place)

    def _address(self, at: int) -> int:
        assert self._memory is not None
        return torch.frombuffer(self._memory, dtype=torch.uint8, offset=at, count=1).data_ptr()

    def _open(self) -> bool:
        self._size = os.fstat(self._descriptor).st_size
        if not room(self._size):
            return False
        self._memory = mmap.mmap(self._descriptor, self._size)
        return True

    def _offered(self) -> dict[int, int]:
        """Places by the step of what they should hold of this very training."""
        if self._memory is None and not self._open():
            return {}
        return {
            header.step: place
            for place, header in enumerate(headers(self._descriptor))
            if header.step >= 0 and header.owner == self._owner and header.length <= room(self._size)
        }

    def _oldest(self) -> int:
        steps = [header.step for header in headers(self._descriptor)]
        return steps.index(min(steps))

    def _views(self, state: Sequence[torch.Tensor], place: int) -> list[torch.Tensor]:
        assert self._memory is not None
        at, views = start(self._size, place), []
        for tensor in state:
            flat = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=at)
            views.append(flat.view(tensor.shape))
            at += _aligned(tensor)
        return views

    def _checksum(self, place: int, length: int) -> int:
        """CRC-32 of the CRC-32s of its pieces, which several threads may compute."""
        memory, begin = self._memory, start(self._size, place)
        assert memory is not None

        def of_piece(at: int) -> bytes:
            with memoryview(memory) as content:
                return zlib.crc32(content[at : min(at + _SUMMED_BYTES, begin + length)]).to_bytes(4, "little")

        with ThreadPoolExecutor(self._threads) as pool:
            return zlib.crc32(b"".join(pool.map(of_piece, range(begin, begin + length, _SUMMED_BYTES))))


def _owner(launch: RankLaunch) -> bytes:
    """Equal for two launches whose state means the same: of one run and rank, divided alike, of one model."""
    job = launch.job
    parts = [
        job.layout.model_dump_json(exclude=_MOVES_NO_STATE),
        job.model.model_dump_json(),
        job.engine,
        job.train.precision,
    ]
    return hashlib.sha256("\n".join([launch.run_id, str(launch.rank), *parts]).encode()).digest()


def _length(state: Sequence[torch.Tensor]) -> int:
    return sum(_aligned(tensor) for tensor in state)


def _aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
