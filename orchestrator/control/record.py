"""Writes what happens to the run folder as it happens, and tells whoever listens. Nothing is remembered elsewhere."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jobs.errors import InputError
from orchestrator.control.ledger import Ledger
from orchestrator.messages import LEFT_ON_REQUEST, Event, StepReport
from orchestrator.run_folder import RunFolder
from parallel.layout import Layout

State = Literal["queued", "starting", "running", "stopping", "done", "failed", "cancelled", "interrupted"]
LIVE: tuple[State, ...] = ("queued", "starting", "running", "stopping")
ORPHANED_SECONDS = 15.0
"""A live state that has not been confirmed for so long belongs to a controller that died."""
UNBORN_SECONDS = 120.0
_LOCAL_CONFIRM_SECONDS = 0.5
_REMOTE_CONFIRM_SECONDS = 5.0
_SAMPLE_SECONDS = 15.0

Throughput = Callable[[float, int], dict[str, float]]
"""From tokens a second, of so many ranks, to what metrics.jsonl says of them: with mfu where the peak is known."""
Listener = Callable[[Event | dict[str, Any]], None]
"""Called with each event and with each line of metrics.jsonl."""


class RunRecord:
    """The controller's pen. One at a time writes a run: its status.json says who, and when it last did."""

    def __init__(
        self, run: RunFolder, layout: Layout, where: Literal["here", "cluster"], throughput: Throughput
    ) -> None:
        self.run, self._throughput = run, throughput
        self._listeners: list[Listener] = []
        earlier = run.read_json("status.json") or {}
        kept = {key: earlier[key] for key in ("created_at", "attempt", "step") if key in earlier}
        controller = {"host": socket.gethostname(), "pid": os.getpid()}
        self._status = new_status(run.run_id, layout, where) | kept | {"controller": controller}
        saved = run.read_json("ledger.json")
        self.ledger = Ledger(self._status["created_at"]) if saved is None else Ledger.resumed(saved, time.time())
        self._ranks: dict[int, dict[str, Any]] = {}
        self._waiting: dict[int, dict[int, StepReport]] = {}
        self.reports: dict[int, StepReport] = {}
        """Of the last step that all ranks reported, by rank."""
        self._confirmed, self._sampled, self._sampled_state = 0.0, 0.0, None
        self._confirm_every = _REMOTE_CONFIRM_SECONDS if run.local is None else _LOCAL_CONFIRM_SECONDS

    @property
    def attempt(self) -> int:
        return int(self._status["attempt"])

    @property
    def step(self) -> int:
        """Last step that every rank has finished in the present attempt."""
        return int(self._status["step"])

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def take_layout(self, layout: Layout) -> None:
        """The run goes on at another one."""
        self._status |= {"layout": layout.as_dict(), "world": layout.world}

    def set_state(self, state: State, reason: str | None = None) -> None:
        self._status |= {"state": state, "reason": reason}
        self.confirm(now=True)

    def begin_attempt(self, nodes: dict[int, str]) -> None:
        """A new attempt with these ranks, by the node that each is on."""
        self._waiting.clear()
        self._status["attempt"] = self.attempt + 1
        self._ranks = {
            rank: {"rank": rank, "pid": None, "node": node, "state": "starting", "step": 0}
            for rank, node in nodes.items()
        }
        self.set_state("starting")

    def event(self, event: Event) -> None:
        if event.attempt == 0:
            event = event.model_copy(update={"attempt": self.attempt})
        self.run.append("events.jsonl", [event.model_dump(exclude={"type"})])
        rank = self._ranks.get(-1 if event.rank is None else event.rank)
        if rank is not None and event.kind == "rank_started":
            rank["pid"] = event.data["pid"]
        elif rank is not None and event.kind == "rank_exited":
            code = event.data["code"]
            rank["state"] = "killed" if code < 0 else {0: "done", LEFT_ON_REQUEST: "left"}.get(code, "failed")
        elif event.kind == "training_started":
            self._status["step"] = event.data["start_step"]
        for listener in self._listeners:
            listener(event)
        self.confirm(now=event.kind in ("rank_started", "rank_exited"))

    def report(self, report: StepReport) -> dict[str, Any] | None:
        """Take one rank's report. The line of metrics.jsonl, once all ranks have reported the step."""
        rank = self._ranks[report.rank]
        rank |= {"state": "running", "step": report.step}
        waiting = self._waiting.setdefault(report.step, {})
        waiting[report.rank] = report
        if len(waiting) < len(self._ranks):
            return None
        del self._waiting[report.step]
        self.reports = waiting
        line = self._line(list(waiting.values()))
        began = self._status["state"] == "starting"
        if began:
            self._status["state"] = "running"
            with _keeps_going(self):  # before the line, so that who has read that finds the run running
                self.run.write_json("status.json", self._status)
        self._status["step"] = report.step
        self.run.append("metrics.jsonl", [line])
        loads = {layer: counts for each in waiting.values() for layer, counts in (each.expert_loads or {}).items()}
        if loads:
            self.run.append("expert_loads.jsonl", [{"step": report.step, "attempt": report.attempt, "loads": loads}])
        for listener in self._listeners:
            listener(line)
        self.confirm(now=began)
        return line

    def catch_up(self, reports: Sequence[StepReport]) -> None:
        """Add the steps that an earlier session's ranks trained and saved with no controller left to hear of them."""
        known = {(line["attempt"], line["step"]) for line in self.run.read_lines("metrics.jsonl")}
        unheard = [report for report in reports if (report.attempt, report.step) not in known]
        self.run.append("metrics.jsonl", [self._line([report]) for report in unheard])
        self._status["step"] = max([self.step, *(report.step for report in unheard)])

    def _line(self, reports: Sequence[StepReport]) -> dict[str, Any]:
        """A line of metrics.jsonl from all ranks' reports of one step."""
        slowest = max(reports, key=lambda each: each.step_seconds)
        line: dict[str, Any] = {
            "step": slowest.step,
            "attempt": slowest.attempt,
            "loss": slowest.loss,
            "grad_norm": slowest.grad_norm,
            "tokens": slowest.tokens,
            "step_seconds": slowest.step_seconds,
            **self._throughput(slowest.tokens / slowest.step_seconds, self._status["world"]),
            "learning_rate": slowest.learning_rate,
            "memory_bytes": max(each.memory_bytes for each in reports),
            "phase_seconds": slowest.phase_seconds,
            "at": max(each.at for each in reports),
        }
        if slowest.validation_loss is not None:
            line["validation_loss"] = slowest.validation_loss
        return line

    def confirm(self, *, now: bool = False) -> None:
        """Write status.json and ledger.json, if they have not been for a while."""
        if not now and time.monotonic() - self._confirmed < self._confirm_every:
            return
        self._confirmed = time.monotonic()
        self._status |= {"updated_at": time.time(), "ranks": list(self._ranks.values())}
        with _keeps_going(self):
            self.run.write_json("status.json", self._status)
            self.run.write_json("ledger.json", self._ledger_record())
            if self._status["state"] != self._sampled_state or time.monotonic() - self._sampled > _SAMPLE_SECONDS:
                self._sample()
            self.run.flush(self._confirm_every)

    def end(self, state: State, reason: str) -> None:
        """The run's last word in this session: its final state, its ledger closed, everything written out."""
        self.ledger.pause(time.time())
        self.event(Event(kind=f"run_{state}", message=reason))
        self.set_state(state, reason)
        self.run.flush()

    def _ledger_record(self) -> dict[str, Any]:
        totals = self.ledger.totals(time.time())
        wall = sum(totals.values())
        overall = {"goodput": totals["productive"] / wall if wall else 0.0}
        if wall and self.ledger.tokens:
            overall |= self._throughput(self.ledger.tokens / wall, self._status["world"])
        return {"wall_seconds": wall, "totals": totals, "overall": overall, **self.ledger.as_dict()}

    def _sample(self) -> None:
        """What the plot of the ledger is drawn from: totals now and then, and whenever the run's state changes."""
        self._sampled, self._sampled_state = time.monotonic(), self._status["state"]
        line: dict[str, Any] = {"at": time.time(), "attempt": self.attempt}
        self.run.append("ledger.jsonl", [line | self.ledger.totals(line["at"])])


@contextlib.contextmanager
def _keeps_going(record: RunRecord) -> Any:
    """A status that cannot be written must not end healthy training; the lines themselves are what counts."""
    try:
        yield
    except OSError:
        record._confirmed = 0.0


def new_status(run_id: str, layout: Layout, where: Literal["here", "cluster"]) -> dict[str, Any]:
    """status.json of a run that nothing has happened to yet."""
    now = time.time()
    return {
        "run_id": run_id,
        "state": "queued",
        "reason": None,
        "created_at": now,
        "updated_at": now,
        "attempt": 0,
        "step": 0,
        "where": where,
        "layout": layout.as_dict(),
        "world": layout.world,
        "ranks": [],
    }


def status_of(run: RunFolder) -> dict[str, Any]:
    """status.json, with `state` `orphaned` where its controller has died: the run waits for `resume`."""
    status: dict[str, Any] | None = run.read_json("status.json")
    if status is None:
        raise InputError(run.path("status.json"), None, "is missing: the run folder is not whole")
    if status.get("state") in LIVE and not _alive(status):
        status |= {"state": "orphaned", "reason": "its controller died"}
    return status


def _alive(status: dict[str, Any]) -> bool:
    """Whether a run's controller lives: by its pid on this host, by its last word elsewhere."""
    controller = status.get("controller")
    if controller is None:  # handed to a Ray cluster whose job has not begun
        return bool(time.time() - status["updated_at"] < UNBORN_SECONDS)
    if controller["host"] == socket.gethostname():
        try:
            os.kill(controller["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return bool(time.time() - status["updated_at"] < ORPHANED_SECONDS)
