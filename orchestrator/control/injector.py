"""Injected faults that come from outside the ranks. Listens to the record of a run, in its controller's process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from jobs.injections import CONTROL_FAULTS, Injection
from orchestrator import manifests
from orchestrator.control.controller import injected
from orchestrator.control.record import RunRecord
from orchestrator.messages import Event
from orchestrator.run_folder import RunFolder


class Injector:
    """Kills this controller or an agent of it, and damages checkpoints. For runs of this machine, on a disk."""

    def __init__(self, record: RunRecord, injections: tuple[Injection, ...]) -> None:
        self._record, spent = record, injected(record.run)
        self._waiting = {
            place: fault
            for place, fault in enumerate(injections)
            if fault.kind in CONTROL_FAULTS and place not in spent
        }

        self._broken: set[int] = set()

    def __call__(self, told: Event | dict[str, Any]) -> None:
        """A listener of the record: what it is told of stands in the run folder already."""
        event = told.kind if isinstance(told, Event) else "step"
        coming = self._record.step if event == "checkpoint_written" else self._record.step + 1
        for place, fault in list(self._waiting.items()):
            if coming < fault.step and place not in self._broken:
                continue
            if event == "step" and fault.moment != "checkpoint_written" and place not in self._broken:
                self._broken.add(place)  # of a healthy run that moment would not come
                self._kill_rank(fault)
            if event == ("step" if fault.kind == "agent_killed" else fault.moment):
                del self._waiting[place]
                self._inject(place, fault, told)
                return  # two at once could not be told apart

    def _inject(self, place: int, fault: Injection, told: Event | dict[str, Any]) -> None:
        data: dict[str, Any] = {"injection": place, "step": self._record.step}
        text = f"injected: {fault.text}"
        if fault.kind in ("agent_killed", "controller_killed"):
            victim = os.getpid() if fault.kind == "controller_killed" else _agent()
            self._record.event(Event(kind="fault_injected", message=text, rank=fault.rank, data=data))
            os.kill(victim, signal.SIGKILL)
            return
        assert isinstance(told, Event), "checkpoints are damaged when an event tells of them"
        step = told.data["step"]
        data |= {"checkpoint": step, "file": damage(self._record.run, step, fault)}
        self._record.event(Event(kind="fault_injected", message=text, rank=fault.rank, data=data))
        self._kill_rank(fault)

    def _kill_rank(self, fault: Injection) -> None:
        ranks = self._record.run.read_json("status.json")["ranks"]
        os.kill(ranks[fault.rank]["pid"], signal.SIGKILL)


def damage(run: RunFolder, step: int, fault: Injection) -> str:
    """Do to the largest file of a checkpoint what `fault` says. Returns its name."""
    entry = max(manifests.read(run, step).files, key=lambda file: file.size_bytes)
    path = Path(run.path(f"{manifests.folder_name(step)}/{entry.name}"))
    if fault.kind == "deleted":
        path.unlink()
    elif fault.kind == "truncated":
        os.truncate(path, entry.size_bytes // 2)
    else:
        with path.open("r+b") as file:
            file.seek(entry.size_bytes // 2)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    return entry.name


def _agent() -> int:
    """Pid of a node agent that this controller's own Ray started."""
    import psutil

    return next(
        int(process.pid)
        for process in psutil.Process().children(recursive=True)
        if any(word.startswith("ray::NodeAgent") for word in process.cmdline()[:1])
    )
