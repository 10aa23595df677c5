"""A rank's state in memory that its node agent owns: it outlives the rank, and the next attempt begins from it.

State changes in the optimizer's step alone. So a copy runs in a thread behind the next step's forward and backward,
and what is not copied when these are done is waited for: that is the only stall. There are two places, so that one is
always whole; what each holds is told by a header that is written last, with a checksum that is verified before use.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.messages import RankLaunch
from orchestrator.worker.engines.protocol import Engine
from orchestrator.worker.reporter import Reporter

_PLACES = 2
_PAGE = 4096
_HEADER = struct.Struct("<qqI32s")
"""Step, bytes, CRC-32 of the content, and whose it is. Step -1: nothing whole is there."""
_CHUNK_BYTES = 1 << 24
_ALIGNED = 64
_SHARE_OF_MEMORY = 0.8
"""Of what the node has free, that snapshots of its ranks may take."""


@dataclass(frozen=True)
class _Held:
    step: int
    place: int
    length: int
    checksum: int


class Snapshots:
    """Made on every rank. `begin` after a step, `finish` before the next update; both on the training thread."""

    def __init__(self, launch: RankLaunch, memory_fd: int, reporter: Reporter) -> None:
        self._interval = launch.job.checkpoint.snapshot_interval
        self._launch, self._descriptor, self._reporter = launch, memory_fd, reporter
        self._owner = _owner(launch)
        self._memory: mmap.mmap | None = None
        self._capacity, self._is_new = 0, False
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self.stall_seconds = 0.0
        """That training waited for copies, since it was last set to 0."""

    def restore(self, engine: Engine, above: int) -> int | None:
        """Collective. The newest step that every rank holds whole, once its state is the engine's; None for none.

        above: the step of the newest checkpoint, which is as good as a snapshot of the same.
        """
        newest = self._launch.snapshots_before
        found = [held for held in self._whole() if held.step > above and (newest is None or held.step < newest)]
        steps: list[set[int]] = [set() for _ in range(dist.get_world_size())]
        dist.all_gather_object(steps, {held.step for held in found})
        common = max(set.intersection(*steps), default=None)
        if common is None:
            return None
        state = engine.state()
        held = next(held for held in found if held.step == common)
        assert state is not None
        for tensor, kept in zip(state, self._views(state, held.place), strict=True):
            tensor.copy_(kept)
        engine.restored(common)
        if self._launch.rank == 0:
            text = f"the state of step {common} is restored from memory"
            self._reporter.event("snapshot_restored", text, step=common)
        return common

    @torch.no_grad()
    def begin(self, engine: Engine, step: int) -> None:
        """Copy the state after `step`, if it is its turn, behind what the caller does until `finish`."""
        if not self._interval or step % self._interval:
            return
        began = time.monotonic()
        if self._thread is not None:
            self._thread.join()  # until its header is written, what is oldest is not known
        state = engine.state()
        if state is None or not self._makes_room(state):
            self._interval = 0
            return
        place = self._oldest()
        self._write_header(place, -1, 0, 0)
        views = self._views(state, place)
        self._copied.clear()
        stream, event = None, None
        if state[0].is_cuda:
            stream, event = torch.cuda.Stream(), torch.cuda.Event()
            stream.wait_stream(torch.cuda.current_stream())
        given = (state, views, place, step, stream, event)
        self._thread = threading.Thread(target=self._copy, args=given, daemon=True)
        self._thread.start()
        self.stall_seconds += time.monotonic() - began

    def finish(self) -> None:
        """Wait until what `begin` copies is copied: after this the state may change."""
        began = time.monotonic()
        self._copied.wait()
        self.stall_seconds += time.monotonic() - began

    @torch.no_grad()
    def _copy(
        self,
        state: Sequence[torch.Tensor],
        views: Sequence[torch.Tensor],
        place: int,
        step: int,
        stream: torch.cuda.Stream | None,
        event: torch.cuda.Event | None,
    ) -> None:
        try:
            with torch.cuda.stream(stream):  # nothing where there is none
                for tensor, view in zip(state, views, strict=True):
                    view.copy_(tensor, non_blocking=stream is not None)
                if stream is not None and event is not None:
                    event.record(stream)
                    event.synchronize()
        finally:  # whatever happened to the copy, training is not to wait for it
            self._copied.set()
        length = sum(_room(tensor) for tensor in state)
        self._write_header(place, step, length, self._checksum(place, length))
        if self._is_new:  # a page's first touch takes longer than a copy: the other place's are made now
            self._is_new = False
            other = _PAGE + (_PLACES - 1 - place) * self._capacity
            torch.frombuffer(self._memory, dtype=torch.uint8, count=length, offset=other).zero_()

    def _makes_room(self, state: Sequence[torch.Tensor]) -> bool:
        length = sum(_room(tensor) for tensor in state)
        if self._capacity >= length and self._memory is not None:
            return True
        ranks = min(self._launch.job.cluster.devices_per_node, dist.get_world_size())
        wanted, free = _PLACES * length * ranks, _available_bytes() + os.fstat(self._descriptor).st_size * ranks
        if wanted > _SHARE_OF_MEMORY * free:
            if self._launch.local_rank == 0:
                text = f"no snapshots: they would take {wanted / 1e9:.1f} GB of the node's {free / 1e9:.1f} GB free"
                self._reporter.event("snapshots_off", text, wanted_bytes=wanted, free_bytes=free)
            return False
        self._memory = None  # views of it may be alive for a while, and end with themselves
        os.ftruncate(self._descriptor, 0)  # what another layout left
        os.ftruncate(self._descriptor, _PAGE + _PLACES * _to_page(length))
        self._open()
        self._is_new = True
        for place in range(_PLACES):
            self._write_header(place, -1, 0, 0)
        if state[0].is_cuda:
            self._pin()
        return True

    def _open(self) -> bool:
        size = os.fstat(self._descriptor).st_size
        if size <= _PAGE:
            return False
        self._memory = mmap.mmap(self._descriptor, size)
        self._capacity = (size - _PAGE) // _PLACES
        return True

    def _pin(self) -> None:
        """Let the device copy there at the link's full speed; where that is refused it copies more slowly."""
        assert self._memory is not None
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0)

    def _whole(self) -> list[_Held]:
        """What this rank's memory holds of this very training, verified."""
        if self._memory is None and not self._open():
            return []
        assert self._memory is not None
        found = []
        for place in range(_PLACES):
            step, length, checksum, owner = _HEADER.unpack_from(self._memory, place * _HEADER.size)
            if step < 0 or owner != self._owner or length > self._capacity:
                continue
            if self._checksum(place, length) != checksum:
                text = f"rank {self._launch.rank}'s snapshot of step {step} is damaged and left aside"
                self._reporter.event("snapshot_damaged", text, step=step)
                continue
            found.append(_Held(step, place, length, checksum))
        return found

    def _oldest(self) -> int:
        assert self._memory is not None
        steps = [_HEADER.unpack_from(self._memory, place * _HEADER.size)[0] for place in range(_PLACES)]
        return steps.index(min(steps))

    def _write_header(self, place: int, step: int, length: int, checksum: int) -> None:
        assert self._memory is not None
        _HEADER.pack_into(self._memory, place * _HEADER.size, step, length, checksum, self._owner)

    def _views(self, state: Sequence[torch.Tensor], place: int) -> list[torch.Tensor]:
        assert self._memory is not None
        at, views = _PAGE + place * self._capacity, []
        for tensor in state:
            flat = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=at)
            views.append(flat.view(tensor.shape))
            at += _room(tensor)
        return views

    def _checksum(self, place: int, length: int) -> int:
        assert self._memory is not None
        found, at = 0, _PAGE + place * self._capacity
        with memoryview(self._memory) as content:
            for start in range(at, at + length, _CHUNK_BYTES):
                found = zlib.crc32(content[start : min(start + _CHUNK_BYTES, at + length)], found)
        return found


def _owner(launch: RankLaunch) -> bytes:
    """Equal for two launches whose state means the same: of one run, rank and layout, in one model and precision."""
    job = launch.job
    parts = [job.layout.model_dump_json(), job.model.model_dump_json(), job.engine, job.train.precision]
    return hashlib.sha256("\n".join([launch.run_id, str(launch.rank), *parts]).encode()).digest()


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED


def _to_page(length: int) -> int:
    return -(-length // _PAGE) * _PAGE


def _available_bytes() -> int:
    """Of this machine, or of the container that this is, where that has less."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    available = int(line.split()[1]) * 1024
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:  # no container, or an older kernel's
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))
