"""Reading a run's logs, from its folder, while it goes on or after."""

from __future__ import annotations

import time
from typing import Any

from jobs.errors import InputError
from orchestrator.control.display import Display
from orchestrator.control.record import LIVE, status_of
from orchestrator.messages import Event
from orchestrator.run_folder import RunFolder

_LOOK_SECONDS = 0.3


def log_file(run: RunFolder, rank: int | None) -> str:
    """Name of a rank's newest log in the run folder; rank 0's where none is asked for."""
    wanted = 0 if rank is None else rank
    attempts = [int(name[8:]) for name in run.names("logs") if name.startswith("attempt-") and name[8:].isdigit()]
    for attempt in sorted(attempts, reverse=True):
        if f"rank-{wanted}.log" in run.names(f"logs/attempt-{attempt}"):
            return f"logs/attempt-{attempt}/rank-{wanted}.log"
    world = status_of(run)["world"]
    if not 0 <= wanted < world:
        raise InputError("--rank", wanted, f"{run.run_id} has ranks 0..{world - 1}", min(max(wanted, 0), world - 1))
    return f"logs/attempt-1/rank-{wanted}.log"


def lines(run: RunFolder, log: str) -> list[str]:
    return run.read(log).decode(errors="replace").splitlines() if run.exists(log) else []


def print_log(run: RunFolder, rank: int | None, *, follow: bool) -> None:
    """Without a rank: the run's steps and events as `run` prints them. With one: what that rank printed itself."""
    if rank is None:
        _print_story(run, follow)
    else:
        _print_rank(run, rank, follow)


def _print_story(run: RunFolder, follow: bool) -> None:
    display = Display(needs_reader=True)
    told: dict[str, int] = {"events.jsonl": 0, "metrics.jsonl": 0}
    while True:
        live = status_of(run).get("state") in LIVE
        fresh: list[tuple[float, Event | dict[str, Any]]] = []
        for name in told:
            records = list(run.read_lines(name))
            for record in records[told[name] :]:
                fresh.append((record["at"], Event.model_validate(record) if name == "events.jsonl" else record))
            told[name] = len(records)
        for _, told_now in sorted(fresh, key=lambda pair: pair[0]):
            display(told_now)
        if not (follow and live):
            return
        time.sleep(_LOOK_SECONDS)


def _print_rank(run: RunFolder, rank: int, follow: bool) -> None:
    printed: dict[str, int] = {}
    while True:
        live = status_of(run).get("state") in LIVE
        log = log_file(run, rank)
        found = lines(run, log)
        for line in found[printed.get(log, 0) :]:
            print(line, flush=True)
        printed[log] = len(found)
        if not (follow and live):
            return
        time.sleep(_LOOK_SECONDS)
