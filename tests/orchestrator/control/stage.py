"""A run with a controller whose machines are a script of what they tell."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sample_runs import step_report

from jobs.spec import JobSpec
from orchestrator.control.controller import Controller
from orchestrator.control.record import RunRecord, status_of
from orchestrator.messages import Event, RankLaunch, Report, Stop
from orchestrator.run_folder import RunFolder
from parallel.layout import Layout
from parallel.planning.planner import plan_job, resolve

Turn = list[Report] | Callable[[], list[Report] | None]


class Clock:
    """Time as the controller sees it: a second passes with each poll."""

    def __init__(self) -> None:
        self.offset = 0.0

    def monotonic(self) -> float:
        return 1000.0 + self.offset

    def time(self) -> float:
        return time.time() + self.offset


class Script:
    """A `Machines` that tells what it is given, turn by turn; a turn may also do something first."""

    def __init__(self, clock: Clock, *turns: Turn) -> None:
        self.clock, self.turns = clock, list(turns)
        self.nodes = ["host-0"]
        self.checks: dict[str, dict[str, Any]] = {}
        self.calls: list[str] = []
        self.launched: list[list[RankLaunch]] = []
        self.grants, self.readiness = [True], [True]
        self.others = 1
        """Nodes that could be had, with those that the run has."""

    def poll(self, timeout_seconds: float) -> list[Report]:
        self.clock.offset += 1
        assert self.turns, "polled after the end of the script"
        turn = self.turns.pop(0)
        return turn if isinstance(turn, list) else turn() or []

    def granted(self, wait_seconds: float) -> bool:
        self.clock.offset += 1
        return self.grants.pop(0) if len(self.grants) > 1 else self.grants[0]

    def prepare(self, wait_seconds: float) -> bool:
        self.clock.offset += 1
        return self.readiness.pop(0) if len(self.readiness) > 1 else self.readiness[0]

    def take(self, job: JobSpec) -> None:
        self.calls.append(f"take {job.layout.dp} x {job.cluster.nodes}")

    def leave_out(self, nodes: set[str]) -> None:
        self.calls.append(f"leave out {', '.join(sorted(nodes))}")

    def available(self) -> int:
        return self.others

    def open_store(self) -> tuple[str, int]:
        return "127.0.0.1", 29500

    def launch(self, launches: list[RankLaunch]) -> None:
        self.calls.append("launch")
        self.launched.append(launches)

    def connect(self) -> None:
        self.calls.append("connect")

    def request(self) -> None:
        self.calls.append("request")

    def start_agents(self) -> None:
        self.calls.append("start_agents")

    def ask_to_stop(self) -> None:
        self.calls.append("ask_to_stop")

    def kill_ranks(self) -> None:
        self.calls.append("kill_ranks")

    def drop_lost(self, node: str | None) -> None:
        self.calls.append(f"drop {node}")

    def forget_from(self, step: int) -> None:
        self.calls.append(f"forget from {step}")

    def release(self) -> None:
        self.calls.append("release")


class Stage:
    """One run with a script, and what came of it."""

    def __init__(self, place: str, clock: Clock, spec: JobSpec, *turns: Turn) -> None:
        self.run = RunFolder(place)
        if not self.run.exists():
            self.run.write_json("job.json", spec.model_dump(mode="json"))
        self.machines = Script(clock, *turns)
        self.record = RunRecord(
            self.run, Layout.of(spec.layout), "here", lambda rate, world: {"tokens_per_second": rate}
        )
        self.controller = Controller(spec, self.record, self.machines)

    def play(self) -> Stop:
        outcome = self.controller.run()
        assert self.machines.turns == [], "the script was not played to its end"
        assert (status_of(self.run)["state"], status_of(self.run)["reason"]) == (outcome.state, outcome.reason)
        assert self.machines.calls[-1] == "release"
        return outcome

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(self.run.read_lines("events.jsonl"))

    def told(self, kind: str) -> list[str]:
        return [event["message"] for event in self.events if event["kind"] == kind]

    @property
    def trained(self) -> list[tuple[int, int]]:
        """(attempt, step) of each line of metrics."""
        return [(line["attempt"], line["step"]) for line in self.run.read_lines("metrics.jsonl")]


SetUp = Callable[..., Stage]
"""`stage(turn, turn, ..., spec=...)`: the fixture of conftest.py."""

# What scripts are made of.

RANKS = range(4)


def resolved(spec: JobSpec) -> JobSpec:
    return resolve(spec, plan_job(spec).plans[0])


def started(attempt: int = 1, start_step: int = 0) -> list[Report]:
    pids = [
        Event(kind="rank_started", message="", attempt=attempt, rank=rank, data={"pid": 100 + rank}) for rank in RANKS
    ]
    data = {"start_step": start_step, "parameters": 1, "unigram_entropy": 3.0}
    return [*pids, Event(kind="training_started", message="", attempt=attempt, rank=0, data=data)]


def trained(*steps: int, attempt: int = 1) -> list[Report]:
    return [step_report(step, rank, attempt) for step in steps for rank in RANKS]


def exited(rank: int, code: int, attempt: int = 1) -> Event:
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return Event(
        kind="rank_exited", message=f"rank {rank} {how}", attempt=attempt, rank=rank, data={"pid": 1, "code": code}
    )


def all_exited(code: int = 0, attempt: int = 1) -> list[Report]:
    return [exited(rank, code, attempt) for rank in RANKS]


def failed(rank: int, attempt: int = 1) -> Event:
    return Event(kind="rank_failed", message="RuntimeError: connection closed by peer", attempt=attempt, rank=rank)


def node_lost() -> Event:
    return Event(kind="node_lost", message="the agent of host-0 is gone", node="host-0")
