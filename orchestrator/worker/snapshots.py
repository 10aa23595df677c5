"""A rank's state in memory that its node agent owns: it outlives the rank, and the next attempt begins from it.

State changes in the optimizer's step alone. So a copy runs in a thread behind the next step's forward and backward,
and what is not copied when these are done is waited for: that is the only stall. There are two places, so that one is
always whole; what each holds is told by a header that is written last, with a checksum that is verified before use.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.messages import RankLaunch
from orchestrator.snapshot_memory import NOTHING, PLACES, Header, headers, room, size_for, start, write_header
from orchestrator.worker.engines.protocol import Engine
from orchestrator.worker.reporter import Reporter

_CHUNK_BYTES = 1 << 24
_ALIGNED = 64
_SHARE_OF_MEMORY = 0.8
"""Of what the node has free, that snapshots of its ranks may take."""


class Snapshots:
    """Made on every rank. `begin` after a step, `finish` before the next update; both on the training thread."""

    def __init__(self, launch: RankLaunch, memory_fd: int, reporter: Reporter) -> None:
        self._interval = launch.job.checkpoint.snapshot_interval
        self._launch, self._descriptor, self._reporter = launch, memory_fd, reporter
        self._owner = _owner(launch)
        self._memory: mmap.mmap | None = None
        self._size, self._is_new = 0, False
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self.stall_seconds = 0.0
        """That training waited for copies, since it was last set to 0."""

    def restore(self, engine: Engine, above: int) -> int | None:
        """Collective. The newest step that every rank holds whole, once its state is the engine's; None for none.

        above: the step of the newest checkpoint, which is as good as a snapshot of the same.
        """
        places = {step: place for step, place in self._whole().items() if step > above}
        steps: list[set[int]] = [set() for _ in range(dist.get_world_size())]
        dist.all_gather_object(steps, set(places))
        common = max(set.intersection(*steps), default=None)
        if common is None:
            return None
        state = engine.state()
        assert state is not None
        for tensor, kept in zip(state, self._views(state, places[common]), strict=True):
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
        write_header(self._descriptor, place, NOTHING)
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
        length = sum(_aligned(tensor) for tensor in state)
        write_header(self._descriptor, place, Header(step, length, self._checksum(place, length), self._owner))
        if self._is_new:  # a page's first touch takes longer than a copy: the other place's are made now
            self._is_new = False
            other = start(self._size, PLACES - 1 - place)
            torch.frombuffer(self._memory, dtype=torch.uint8, count=length, offset=other).zero_()

    def _makes_room(self, state: Sequence[torch.Tensor]) -> bool:
        length = sum(_aligned(tensor) for tensor in state)
        if self._memory is not None and room(self._size) >= length:
            return True
        ranks = min(self._launch.job.cluster.devices_per_node, dist.get_world_size())
        each = 2 if self._launch.job.cluster.nodes > 1 else 1  # a node keeps another's too
        wanted = PLACES * length * ranks * each
        free = _available_bytes() + os.fstat(self._descriptor).st_size * ranks * each
        if wanted > _SHARE_OF_MEMORY * free:
            if self._launch.local_rank == 0:
                text = f"no snapshots: they would take {wanted / 1e9:.1f} GB of the node's {free / 1e9:.1f} GB free"
                self._reporter.event("snapshots_off", text, wanted_bytes=wanted, free_bytes=free)
            return False
        self._memory = None  # views of it may be alive for a while, and end with themselves
        os.ftruncate(self._descriptor, 0)  # what another layout left
        os.ftruncate(self._descriptor, size_for(length))
        self._open()
        self._is_new = True
        for place in range(PLACES):
            write_header(self._descriptor, place, NOTHING)
        if state[0].is_cuda:
            self._pin()
        return True

    def _open(self) -> bool:
        self._size = os.fstat(self._descriptor).st_size
        if not room(self._size):
            return False
        self._memory = mmap.mmap(self._descriptor, self._size)
        return True

    def _pin(self) -> None:
        """Let the device copy there at the link's full speed; where that is refused it copies more slowly."""
        assert self._memory is not None
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0)

    def _whole(self) -> dict[int, int]:
        """Places by the step of what they hold of this very training, verified."""
        if self._memory is None and not self._open():
            return {}
        found = {}
        for place, header in enumerate(headers(self._descriptor)):
            if header.step < 0 or header.owner != self._owner or header.length > room(self._size):
                continue
            if self._checksum(place, header.length) != header.checksum:
                text = f"rank {self._launch.rank}'s snapshot of step {header.step} is damaged and left aside"
                self._reporter.event("snapshot_damaged", text, step=header.step)
                continue
            found[header.step] = place
        return found

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
        assert self._memory is not None
        found, end = 0, start(self._size, place) + length
        with memoryview(self._memory) as content:
            for at in range(end - length, end, _CHUNK_BYTES):
                found = zlib.crc32(content[at : min(at + _CHUNK_BYTES, end)], found)
        return found


def _owner(launch: RankLaunch) -> bytes:
    """Equal for two launches whose state means the same: of one run, rank and layout, in one model and precision."""
    job = launch.job
    parts = [job.layout.model_dump_json(), job.model.model_dump_json(), job.engine, job.train.precision]
    return hashlib.sha256("\n".join([launch.run_id, str(launch.rank), *parts]).encode()).digest()


def _aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED


def _available_bytes() -> int:
    """Of this machine, or of the container that this is, where that has less."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    available = int(line.split()[1]) * 1024
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:  # no container, or an older kernel's
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))
