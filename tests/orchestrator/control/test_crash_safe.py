"""A controller killed at any change to its run folder: what it controlled is taken up again, whole and once."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from sample_runs import event_line, job, step_report

from jobs.errors import InputError
from jobs.spec import JobSpec
from orchestrator.control import session
from orchestrator.control.controller import Controller, cancel
from orchestrator.control.record import RunRecord, status_of
from orchestrator.files import Hook, unhindered
from orchestrator.messages import Event, RankLaunch, Report, Stop
from orchestrator.run_folder import RunFolder
from parallel.layout import Layout
from parallel.planning.planner import plan_job, resolve

STEPS = 3
STORIES = ("undisturbed", "rank_died", "node_lost", "out_of_memory", "cancelled")


class Rehearsed:
    """Machines on which the first attempt of a run goes as its story says, and every other to the last step.

    Launches are written down beside the run, where a crash does not reach them.
    """

    def __init__(self, run: RunFolder, story: str) -> None:
        self._run, self._story, self._told = run, story, list[list[Report]]()
        self.nodes, self.checks = ["host-0"], dict[str, dict[str, Any]]()

    @property
    def launched(self) -> list[int]:
        path = Path(f"{self._run.place}.launched")
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def launch(self, launches: list[RankLaunch]) -> None:
        attempt, ranks = launches[0].attempt, range(len(launches))
        first = not self.launched
        with open(f"{self._run.place}.launched", "a") as file:
            file.write(f"{attempt}\n")
        pids = [Event(kind="rank_started", message="", attempt=attempt, rank=rank, data={"pid": 7}) for rank in ranks]
        data = {"start_step": 0, "unigram_entropy": 3.0}
        begun = Event(kind="training_started", message="", attempt=attempt, rank=0, data=data)
        steps: list[list[Report]] = [
            [step_report(step, rank, attempt, at=1e9 + step) for rank in ranks] for step in range(1, STEPS + 1)
        ]
        ends: list[Report] = [self._exit(rank, 0, attempt) for rank in ranks]
        broken: dict[str, Report] = {
            "rank_died": self._exit(1, -9, attempt),
            "node_lost": Event(kind="node_lost", message="host-0 is gone", attempt=attempt, node="host-0"),
            "out_of_memory": Event(kind="rank_failed", message="MemoryError: ", attempt=attempt, rank=1),
        }
        self._told = [[*pids, begun], *steps, ends]
        if first and self._story in broken:
            self._told[2:] = [[broken[self._story]]]
        if first and self._story == "cancelled":
            self._told[2:] = [[], [self._exit(rank, 75, attempt) for rank in ranks]]

    def poll(self, timeout_seconds: float) -> list[Report]:
        if self._story == "cancelled" and len(self._told) == 2 and len(self.launched) == 1:
            cancel(self._run)
        return self._told.pop(0) if self._told else []

    def _exit(self, rank: int, code: int, attempt: int) -> Report:
        data = {"pid": 7, "code": code}
        return Event(kind="rank_exited", message=f"rank {rank} left", attempt=attempt, rank=rank, data=data)

    def granted(self, wait_seconds: float) -> bool:
        return True

    prepare = granted

    def available(self) -> int:
        return 1

    def open_store(self) -> tuple[str, int]:
        return "127.0.0.1", 29500

    def kill_ranks(self) -> None:
        self._told = []

    def connect(self) -> None: ...
    def take(self, job: JobSpec) -> None: ...
    def leave_out(self, nodes: set[str]) -> None: ...
    def request(self) -> None: ...
    def start_agents(self) -> None: ...
    def ask_to_stop(self) -> None: ...
    def release(self) -> None: ...
    def drop_lost(self, node: str | None) -> None: ...
    def forget_from(self, step: int) -> None: ...


def control(place: str, story: str, before: Hook = unhindered) -> Stop:
    """One life of a controller, as `session` leads it."""
    run = RunFolder(place, before)
    spec = JobSpec.model_validate(run.read_json("job.json"))
    with session.taken(run):
        if status_of(run)["state"] != "queued":
            session.resume(run, spec, ())
        record = RunRecord(run, Layout.of(spec.layout), "here", lambda rate, world: {"tokens_per_second": rate})
        return Controller(spec, record, Rehearsed(run, story)).run()


def killed_at(change: int, place: str, story: str) -> bool:
    """Whether the controller came to so many changes, and was killed there."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def count(action: str, name: str) -> None:
            nonlocal seen
            seen += 1
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            control(place, story, count)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def created(folder: Path) -> str:
    spec = job(f"train.steps={STEPS}")
    planning = plan_job(spec)
    return session.create(resolve(spec, planning.plans[0]), planning, str(folder), "here").place


@pytest.mark.parametrize("story", STORIES)
def test_a_run_whose_controller_is_killed_at_any_change_is_whole_in_the_end(tmp_path: Path, story: str) -> None:
    draw, kills = random.Random(story), 0
    while kills < 10:
        place = created(tmp_path)
        changes = [draw.randint(1, 60), draw.randint(1, 30)]
        lives = [change for change in changes if killed_at(change, place, story)]
        kills += len(lives)
        run = RunFolder(place)
        if lives:
            assert status_of(run)["state"] in ("orphaned", "done", "cancelled", "queued"), (changes, status_of(run))
        if status_of(run)["state"] != "done":
            assert control(place, story).state == "done", changes
        launched = Rehearsed(run, story).launched
        assert len(set(launched)) == len(launched), changes  # no attempt twice
        lines = [(line["attempt"], line["step"]) for line in run.read_lines("metrics.jsonl")]
        assert len(set(lines)) == len(lines), changes
        assert {step for _, step in lines} == set(range(1, STEPS + 1)), changes
        assert [event["kind"] for event in run.read_lines("events.jsonl")][-1] == "run_done"
        assert status_of(run)["state"] == "done"
        ledger = run.read_json("ledger.json")
        assert ledger["wall_seconds"] == pytest.approx(sum(ledger["totals"].values()))


def test_a_run_is_controlled_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunFolder(created(tmp_path))
    run.append("events.jsonl", [event_line("resumed", "")])
    with session.taken(run), pytest.raises(InputError, match="is controlled by another process"), session.taken(run):
        pass
    with session.taken(run):
        pass
