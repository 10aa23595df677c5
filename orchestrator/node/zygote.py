"""A process with torch and the engine imported, from which ranks are forked: 0.06 s a rank instead of 3 s or more.

It outlives attempts, so a restart imports nothing. It is single-threaded and computes nothing itself (no CUDA context,
no OpenMP threads), which is what makes forking it safe. It talks with the node agent over one socket, a JSON message a
packet; when the agent is gone it asks its ranks to checkpoint and leave, and ends them after the grace period.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.messages import LEFT_ON_REQUEST, PACKET_BYTES, RankLaunch
from orchestrator.node.evidence import forget_record, record_collectives
from orchestrator.run_folder import import_filesystem

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_MOST_DESCRIPTORS = 3
"""Sent with a fork: the rank's page (orchestrator/pulse.py), the memory of its snapshots and, to rank 0, the store that
it serves."""


def main() -> None:
    """Started by the agent with ENGINE DEVICE GRACE_SECONDS RUN_PLACE CONTROL_FD REPORT_FD LOCK_FD."""
    (engine, device), grace, run_place = sys.argv[1:3], float(sys.argv[3]), sys.argv[4]
    control_fd, report_fd, _lock_fd = map(int, sys.argv[5:8])
    if os.fork():
        # Not the agent's child any more: Ray ends the children of a worker whose driver is gone, but ranks that
        # lose their controller are to write a checkpoint first.
        os._exit(0)
    os.setsid()
    control = socket.socket(fileno=control_fd)
    began = time.monotonic()
    from orchestrator.worker import main as worker

    worker.import_engine(engine, device)
    import_filesystem(run_place)
    gc.freeze()  # what was imported is nobody's garbage: each rank would look through it, and have it copied
    _send(control, {"kind": "ready", "pid": os.getpid(), "import_seconds": time.monotonic() - began})
    Zygote(control, report_fd, grace, worker.run, partial(worker.measure, device)).serve()


class Zygote:
    def __init__(
        self, control: socket.socket, report_fd: int, grace: float, run_rank: Any, measure: Callable[[Path], Any]
    ) -> None:
        self._control, self._report_fd, self._grace = control, report_fd, grace
        self._run_rank, self._measure = run_rank, measure
        self._watched = selectors.DefaultSelector()
        self._watched.register(control, selectors.EVENT_READ)
        self._ranks: dict[int, tuple[RankLaunch, int]] = {}  # pidfd -> (launch, pid)
        self._any_died = False

    def serve(self) -> None:
        while True:
            for key, _ in self._watched.select():
                if key.fileobj is self._control:
                    if not self._obey():
                        self._leave()
                        return
                else:
                    self._reap(int(key.fd))

    def _obey(self) -> bool:
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._control, PACKET_BYTES, _MOST_DESCRIPTORS)
        except ConnectionResetError:  # gone, with something of ours unread
            return False
        if not packet:
            return False
        message = json.loads(packet)
        if message["kind"] == "fork":
            self._fork(RankLaunch.model_validate(message["launch"]), message["log"], descriptors)
        elif message["kind"] == "preflight":
            self._check(message["folder"])
        else:
            self._signal(message["signal"])
        return True

    def _fork(self, launch: RankLaunch, log: str, descriptors: list[int]) -> None:
        self._any_died = False
        pid = os.fork()
        if pid == 0:
            self._become_rank(launch, log, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        watch = os.pidfd_open(pid)
        self._ranks[watch] = (launch, pid)
        self._watched.register(watch, selectors.EVENT_READ)
        _send(self._control, {"kind": "forked", "rank": launch.rank, "pid": pid, "attempt": launch.attempt})

    def _check(self, folder: str) -> None:
        """Measure this machine in a process of its own, while there are no ranks: a zygote computes nothing itself."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                found = self._measure(Path(folder))
                status = 0 if self._control.send(json.dumps({"kind": "preflight", "found": found}).encode()) else 1
            finally:
                os._exit(status)
        if os.waitpid(pid, 0)[1]:
            _send(self._control, {"kind": "preflight", "found": None})

    def _become_rank(self, launch: RankLaunch, log: str, descriptors: list[int]) -> None:
        """In the child. Never returns: a rank must not run the zygote's code."""
        status = 1
        try:
            libc = ctypes.CDLL(None)
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            libc.prctl(_PR_SET_NAME, f"rank-{launch.rank}".encode())
            self._control.close()
            self._watched.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to judge
            Path(log).parent.mkdir(parents=True, exist_ok=True)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = _Log(sys.stdout), _Log(sys.stderr)
            record_collectives()
            status = self._run_rank(launch, self._report_fd, *descriptors)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _reap(self, watch: int) -> None:
        launch, pid = self._ranks.pop(watch)
        self._watched.unregister(watch)
        os.close(watch)
        forget_record(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._any_died |= code not in (0, LEFT_ON_REQUEST)
        _send(
            self._control,
            {"kind": "exited", "rank": launch.rank, "attempt": launch.attempt, "pid": pid, "code": code},
        )

    def _signal(self, number: int) -> None:
        for watch in self._ranks:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(watch, number)

    def _leave(self) -> None:
        """The agent is gone. Whole groups may still save what they have trained; broken ones can only wait in vain."""
        self._watched.unregister(self._control)
        self._signal(signal.SIGKILL if self._any_died else signal.SIGTERM)
        deadline = time.monotonic() + self._grace
        while self._ranks and time.monotonic() < deadline and not self._any_died:
            for key, _ in self._watched.select(timeout=deadline - time.monotonic()):
                self._reap(int(key.fd))
        self._signal(signal.SIGKILL)
        while self._ranks:
            for key, _ in self._watched.select():
                self._reap(int(key.fd))


class _Log:
    """A rank's output. Where a disk is full a line is lost, and not what is trained."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    """Tell the agent; that it is gone is for `_obey` to notice, which then lets the ranks save what they have."""
    with contextlib.suppress(OSError):
        control.send(json.dumps(message).encode())


if __name__ == "__main__":
    main()
