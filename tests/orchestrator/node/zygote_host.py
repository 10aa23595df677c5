"""A zygote as its agent starts it, whose ranks do what their run's id says instead of training."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from pathlib import Path

from orchestrator.messages import LEFT_ON_REQUEST, Event, RankLaunch
from orchestrator.node import zygote
from orchestrator.worker import main as worker

sys.path.append(str(Path(__file__).parents[1]))
from sample_runs import step_report


def run_rank(launch: RankLaunch, report_fd: int, pulse_fd: int, memory_fd: int, store_fd: int | None = None) -> int:
    reports = socket.socket(fileno=report_fd)

    def tell(kind: str) -> None:
        event = Event(kind=kind, message="", attempt=launch.attempt, rank=launch.rank, data={"store": store_fd})
        reports.send(event.model_dump_json().encode())

    def leave(number: int, frame: object) -> None:
        """As ranks leave that have saved their work: rank 0, which writes the manifest, is the last."""
        time.sleep(0.2 if launch.rank == 0 else 0)
        tell("left")
        os._exit(LEFT_ON_REQUEST)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if launch.run_id == "deaf" else leave)
    print(f"rank {launch.rank} is {launch.run_id}")
    tell("at_work")
    if launch.run_id == "diverged":
        reports.send(step_report(1, launch.rank, launch.attempt, loss=math.nan).model_dump_json().encode())
    if launch.run_id == "wrong":
        return 3
    if launch.run_id == "broken":
        raise ValueError("a bug in a rank")
    if launch.run_id == "aborted":
        os.abort()
    for _ in range(3000):  # a signal that comes just before one long sleep would be handled only after it
        time.sleep(0.02)
    return 0


if __name__ == "__main__":
    worker.import_engine, worker.run = lambda engine, device: None, run_rank
    worker.measure = lambda device, folder: {"gflops": 1.0}
    zygote.main()
