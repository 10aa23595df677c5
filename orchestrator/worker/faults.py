"""Injected faults of one rank: the one place where a rank does what real machines do to it. Each is told before."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jobs.injections import CONTROL_FAULTS, SAVE_FAULTS, Injection
from orchestrator.messages import RankLaunch
from orchestrator.pulse import Phase, Pulse
from orchestrator.worker.reporter import Reporter

_HEARD_SECONDS = 0.2
"""For the word of a fault to leave this rank, where what carries it on goes too."""
_FULL_DISK_BYTES = 1 << 12
_MORE_MEMORY = 1 << 28
_OF_THE_UPDATE = ("nan", "exploding_loss")
_WRITING = os.O_WRONLY | os.O_RDWR
_COLLECTIVES = (
    "allreduce",
    "allgather",
    "_allgather_base",
    "reduce_scatter",
    "_reduce_scatter_base",
    "broadcast",
    "alltoall_base",
    "send",
    "recv",
)


class Faults:
    """Follows its rank through the phases of each step, and does what was asked for there."""

    def __init__(self, launch: RankLaunch, reporter: Reporter, pulse: Pulse) -> None:
        chosen = [(place, launch.job.injections[place]) for place in launch.injections]
        mine = [each for each in chosen if each[1].rank == launch.rank and each[1].kind not in CONTROL_FAULTS]
        self._waiting = dict(mine)
        self._rates = {fault.step: fault.factor for _, fault in chosen if fault.kind == "exploding_loss"}
        self._slow: list[Injection] = []
        self._device, self._reporter, self._pulse = launch.job.cluster.device, reporter, pulse
        self._step, self._computed, self._began = 0, 0.0, 0.0
        self._files = 0
        self._saving = self._skips = False
        self._delay = 0.0
        kinds = {fault.kind for fault in self._waiting.values()}
        if kinds & set(SAVE_FAULTS):
            sys.addaudithook(self._hear)
        if "slow_network" in kinds:
            self._delay_collectives()

    def enter(self, phase: Phase, step: int) -> None:
        """The rank begins a phase of a step."""
        now = time.monotonic()
        if self._began:
            self._computed, self._began = now - self._began, 0.0
        self._step, self._skips = step, False
        self._slow = [fault for fault in self._slow if step < fault.step + fault.steps]
        for place, fault in self._due(step):
            if fault.kind not in (*SAVE_FAULTS, *_OF_THE_UPDATE) and fault.phase == phase:
                self._tell(place, fault)
                self._do(fault)
        self._drag(phase)

    def learning_rate(self, rate: float) -> float:
        """With what this rank updates its part of the weights: a rate that ruins them, where that was asked for.

        A loss explodes by all weights, which is every rank's part; one that is no number, by any.
        """
        for place, fault in self._due(self._step):
            if fault.kind in _OF_THE_UPDATE:
                self._tell(place, fault)
            if fault.kind == "nan":
                return float("nan")
        return rate * self._rates.get(self._step, 1.0)

    def skips_collective(self) -> bool:
        """Whether the rank is to leave out its part of this step's agreement, and go on."""
        return self._skips

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """What is opened for writing or renamed in checkpoints meanwhile is counted."""
        self._step, self._saving = step, True
        yield
        self._saving = False
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def _due(self, step: int) -> list[tuple[int, Injection]]:
        return [(place, fault) for place, fault in self._waiting.items() if fault.step == step]

    def _tell(self, place: int, fault: Injection) -> None:
        del self._waiting[place]
        self._reporter.event("fault_injected", f"injected: {fault.text}", injection=place, step=self._step)

    def _do(self, fault: Injection) -> None:
        match fault.kind:
            case "exception":
                raise RuntimeError(f"injected at step {self._step}")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            case "segfault":
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                ctypes.string_at(0)
            case "held_lock":
                while True:  # unlike CDLL, PyDLL keeps the interpreter's lock during the call
                    ctypes.PyDLL(None).sleep(3600)
            case "skipped_collective":
                self._skips = True
            case "livelock":
                while True:
                    self._pulse.enter("data", self._step)
                    time.sleep(0.01)
                    self._pulse.enter("compute", self._step)
            case "out_of_memory":
                _exhaust_memory(self._device)
            case "zygote_killed":
                time.sleep(_HEARD_SECONDS)
                os.kill(os.getppid(), signal.SIGKILL)
            case _:
                self._slow.append(fault)

    def _drag(self, phase: Phase) -> None:
        """Be slow in this phase, by as much as was asked for."""
        self._delay = sum(fault.seconds for fault in self._slow if fault.kind == "slow_network")
        for fault in self._slow:
            if fault.kind == "slow_data" and phase == "data":
                time.sleep(fault.seconds)
            if fault.kind == "slow_compute" and phase == "compute":
                until = time.monotonic() + (fault.factor - 1) * self._computed
                while time.monotonic() < until:
                    pass
        if phase == "compute":
            self._began = time.monotonic()

    def _delay_collectives(self) -> None:
        """Below whoever counts collectives, as a slow link is: they begin in time and last longer."""
        import torch.distributed as dist

        def delayed(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                time.sleep(self._delay)
                return method(*arguments, **named)

            return call

        for name in _COLLECTIVES:
            setattr(dist.ProcessGroup, name, delayed(getattr(dist.ProcessGroup, name)))

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Audit hook: every file that this process opens or renames passes here first, whoever does it."""
        if not self._saving or event not in ("open", "os.rename") or "/checkpoints/" not in str(arguments[0]):
            return
        if event == "open" and not arguments[2] & _WRITING:
            return
        self._files += 1
        for place, fault in list(self._waiting.items()):
            if fault.kind in SAVE_FAULTS and fault.step <= self._step and fault.point <= self._files:
                self._tell(place, fault)
                self._spoil(fault)

    def _spoil(self, fault: Injection) -> None:
        match fault.kind:
            case "save_killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "disk_full":  # until this checkpoint is over the kernel refuses to make a file larger
                resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL_DISK_BYTES, resource.RLIM_INFINITY))
            case "storage_error":
                raise OSError(errno.EIO, "injected: input/output error")
            case _:
                time.sleep(fault.seconds)


def _exhaust_memory(device: str) -> None:
    """Ask for more than there is: of the GPU's memory, or of what this process may have."""
    import torch

    if device == "cuda":
        torch.empty(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory, device="cuda")
    with open("/proc/self/statm") as sizes:
        present = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (present + _MORE_MEMORY, resource.RLIM_INFINITY))
    try:
        bytearray(2 * _MORE_MEMORY)
    finally:  # the rank must be able to say what happened to it
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
