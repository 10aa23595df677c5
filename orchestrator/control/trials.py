"""Runs a layout for a few steps as an ordinary run, and reads from its folder what it came to."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from jobs.errors import InputError
from jobs.spec import JobSpec
from orchestrator.control import controller, session
from orchestrator.control.display import Display
from orchestrator.control.record import status_of
from orchestrator.control.tune import Trial
from orchestrator.run_folder import RunFolder
from parallel.planning import planner

WARM_STEPS = 2
"""That are not counted, where more are run: kernels are chosen, communicators made."""

START_SECONDS = 600.0
"""For which nothing may be heard between the nodes' start and the first step: engines are built, text is read."""

_LOOK_SECONDS = 0.5
_ENDED = ("done", "failed", "cancelled", "interrupted", "orphaned")
_NO_ROOM = re.compile(r"out of memory|OutOfMemory|can't allocate memory|not enough memory|bad_alloc", re.IGNORECASE)


class Trials:
    """Runs trials one after another: on this machine, or on the Ray cluster that `client` hands jobs to."""

    def __init__(self, root: str, display: Display, client: Any = None) -> None:
        self._root, self._display, self._client = root, display, client

    def __call__(self, job: JobSpec, plan: planner.Plan, patience_seconds: float) -> Trial:
        where = "here" if self._client is None else "cluster"
        run = session.create(job, planner.Planning((plan,), (), 1), self._root, where)  # type: ignore[arg-type]
        with _watched(run, patience_seconds) as hung:
            if self._client is None:
                self._here(run, job)
            else:
                session.submit(run, job, self._client)
                session.wait_until(run, _ENDED, float("inf"))  # type: ignore[arg-type]
        if status_of(run)["state"] == "interrupted" or (status_of(run)["state"] == "cancelled" and not hung):
            raise KeyboardInterrupt
        return outcome(run, job, patience_seconds if hung else None)

    def _here(self, run: RunFolder, job: JobSpec) -> None:
        """Whatever ends a trial is written in its folder; what is to be done with Ctrl-C is as before, afterwards."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with contextlib.suppress(InputError, Exception):
                session.run_here(run, job, self._display)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def outcome(run: RunFolder, job: JobSpec, hung_seconds: float | None) -> Trial:
    """What a trial's folder says of it; `hung_seconds`: for which nothing was heard, where it was ended for that."""
    status = status_of(run)
    if hung_seconds is not None:
        return Trial(run.run_id, "hung", f"nothing was heard for {hung_seconds:.0f} s after step {status['step']}")
    lines = list(run.read_lines("metrics.jsonl"))
    if status["state"] != "done" or not lines:
        reason = str(status["reason"] or f"ended as {status['state']}")
        return Trial(run.run_id, "out of memory" if _NO_ROOM.search(reason) else "failed", reason)
    seconds = np.array([line["step_seconds"] for line in lines])[min(WARM_STEPS, len(lines) - 1) :]
    spread = float(np.std(np.log(seconds), ddof=1)) if len(seconds) > 1 else 0.0
    return Trial(
        run.run_id,
        "ran",
        seconds=float(np.median(seconds)),
        # Of a median of many: sqrt(pi/2) of a mean's.
        deviation=spread * float(np.sqrt(np.pi / 2 / len(seconds))),
        memory_bytes=_tensor_bytes(max(line["memory_bytes"] for line in lines), job),
    )


def _tensor_bytes(peak: int, job: JobSpec) -> int | None:
    """Of what is recorded: on a CPU, the process with all its libraries."""
    if job.cluster.device == "cuda":
        return peak
    left = peak - planner.device_of(job).reserved_bytes
    return left if left > 0 else None


@contextlib.contextmanager
def _watched(run: RunFolder, patience_seconds: float) -> Iterator[list[bool]]:
    """Cancels the run when nothing is heard of it for too long; the list is empty unless that happened."""
    hung: list[bool] = []
    over = threading.Event()

    def watch() -> None:
        seen, deadline = (False, 0), float("inf")
        while not over.wait(_LOOK_SECONDS):
            now = _progress(run)
            if now != seen:
                seen = now
                ready, steps = now
                deadline = time.monotonic() + patience_seconds + (0 if steps else START_SECONDS) if ready else deadline
            if time.monotonic() > deadline:
                hung.append(True)
                controller.cancel(run)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield hung
    finally:
        over.set()
        thread.join()


def _progress(run: RunFolder) -> tuple[bool, int]:
    """Whether the nodes are ready, and how many steps are trained. Waiting for nodes is bounded by the job's policy."""
    look = RunFolder(run.place)
    ready = any(event["kind"] == "nodes_ready" for event in look.read_lines("events.jsonl"))
    return ready, sum(1 for _ in look.read_lines("metrics.jsonl"))
