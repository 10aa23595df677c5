"""A rank without an agent: what it is launched with, and what its reporter says."""

from __future__ import annotations

import socket
from pathlib import Path

from jobs.spec import JobSpec
from orchestrator.messages import Event, RankLaunch, parse_report
from orchestrator.worker.reporter import Reporter


class AgentEnd:
    """The agent's end of a rank's socket."""

    def __init__(self, job: JobSpec, rank: int, folder: Path | str) -> None:
        self.launch = RankLaunch(
            run_id="run-1",
            attempt=1,
            rank=rank,
            local_rank=rank,
            store_address="",
            store_port=1,
            run_folder=str(folder),
            job=job,
            checkpoint_steps=(),
        )
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.reporter = Reporter(self.launch, theirs.detach())

    def events(self) -> list[Event]:
        """All that came by now."""
        found = []
        while True:
            try:
                report = parse_report(self._ours.recv(1 << 20))
            except BlockingIOError:
                return found
            if isinstance(report, Event):
                found.append(report)
