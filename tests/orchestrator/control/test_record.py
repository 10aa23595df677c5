"""What the controller writes down: a line once all ranks have spoken, where each rank stands, who is alive."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from sample_runs import job, make_run, metrics_line, step_report

from jobs.spec import JobSpec
from orchestrator.control import record as module
from orchestrator.control.record import ORPHANED_SECONDS, UNBORN_SECONDS, RunRecord, status_of
from orchestrator.control.session import throughput
from orchestrator.messages import Event
from orchestrator.run_folder import RunFolder
from parallel.layout import Layout


def new_record(place: str, spec: JobSpec | None = None) -> RunRecord:
    spec = spec or job()
    run = RunFolder(place)
    if not run.exists():
        run.write_json("job.json", {})
    layout = Layout.of(spec.layout)
    return RunRecord(run, layout, "here", throughput(spec))


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    made = new_record(str(tmp_path / "run-1"))
    made.begin_attempt(dict.fromkeys(range(4), "host-0"))
    return made


def lines(record: RunRecord) -> list[dict[str, Any]]:
    return list(record.run.read_lines("metrics.jsonl"))


def rank_states(record: RunRecord) -> list[str]:
    record.confirm(now=True)
    return [rank["state"] for rank in status_of(record.run)["ranks"]]


def exited(rank: int, code: int) -> Event:
    return Event(kind="rank_exited", message="", rank=rank, attempt=1, data={"pid": 7, "code": code})


def test_a_step_becomes_a_line_once_every_rank_has_reported_it(record: RunRecord) -> None:
    heard: list[Any] = []
    record.listen(heard.append)
    for rank in (2, 0, 3):
        assert record.report(step_report(1, rank)) is None
    assert (lines(record), record.step) == ([], 0)
    line = record.report(step_report(1, 1, step_seconds=0.8, at=1_000_003.5))
    assert lines(record) == heard == [line]
    assert record.step == 1
    assert line == {
        "step": 1,
        "attempt": 1,
        "loss": 4.9,
        "grad_norm": 1.5,
        "tokens": 2048,
        "step_seconds": 0.8,  # the slowest rank's, as is what follows from it
        "tokens_per_second": 2560.0,
        "learning_rate": 1e-3,
        "memory_bytes": 300_000_003,  # the fullest rank's
        "phase_seconds": {"data": 0.1, "compute": 0.4, "evaluate": 0.0},
        "at": 1_000_003.5,  # the last rank's
    }


def test_that_it_trains_is_written_at_once(record: RunRecord) -> None:
    assert status_of(record.run)["state"] == "starting"
    for rank in range(4):
        record.report(step_report(1, rank))
    assert (status_of(record.run)["state"], status_of(record.run)["step"]) == ("running", 1)


def test_steps_may_overlap(record: RunRecord) -> None:
    for rank in (0, 1, 2):
        record.report(step_report(1, rank))
    for rank in (0, 1):
        record.report(step_report(2, rank))
    record.report(step_report(1, 3))
    assert record.step == 1
    for rank in (2, 3):
        record.report(step_report(2, rank))
    assert [line["step"] for line in lines(record)] == [1, 2]


def test_what_only_some_steps_or_devices_have(tmp_path: Path) -> None:
    spec = job("cluster=h200_x8", "train.precision=bf16")
    record = new_record(str(tmp_path / "run-1"), spec)
    record.begin_attempt({0: "host-0"})
    line = record.report(step_report(1, validation_loss=3.5))
    assert line is not None
    assert line["validation_loss"] == 3.5
    per_second = spec.model.flops_per_token(spec.train.sequence_length) * line["tokens_per_second"]
    assert line["mfu"] == pytest.approx(per_second / (4 * 989.5e12))


def test_a_loss_that_diverges_is_written_and_read(record: RunRecord) -> None:
    for rank in range(4):
        record.report(step_report(1, rank, loss=math.nan, grad_norm=math.inf))
    (line,) = lines(record)
    assert math.isnan(line["loss"])
    assert line["grad_norm"] == math.inf


def test_where_each_rank_stands(record: RunRecord) -> None:
    assert rank_states(record) == ["starting"] * 4
    record.event(Event(kind="rank_started", message="", rank=2, attempt=1, data={"pid": 4711}))
    record.report(step_report(1, 2))
    assert rank_states(record) == ["starting", "starting", "running", "starting"]
    rank = status_of(record.run)["ranks"][2]
    assert rank == {"rank": 2, "pid": 4711, "node": "host-0", "state": "running", "step": 1}
    for number, code in enumerate((0, 75, -9, 1)):
        record.event(exited(number, code))
    assert rank_states(record) == ["done", "left", "killed", "failed"]


def test_the_state_of_a_run_from_its_start_to_its_end(tmp_path: Path) -> None:
    record = new_record(str(tmp_path / "run-1"))
    record.set_state("queued")
    assert status_of(record.run)["state"] == "queued"
    record.begin_attempt(dict.fromkeys(range(4), "host-0"))
    assert (status_of(record.run)["state"], status_of(record.run)["attempt"]) == ("starting", 1)
    for rank in range(4):
        record.report(step_report(1, rank))
    record.confirm(now=True)
    assert (status_of(record.run)["state"], status_of(record.run)["step"]) == ("running", 1)
    record.set_state("stopping", "cancelled at step 1")
    record.end("cancelled", "cancelled at step 1")
    status = status_of(record.run)
    assert (status["state"], status["reason"]) == ("cancelled", "cancelled at step 1")
    last = list(record.run.read_lines("events.jsonl"))[-1]
    assert (last["kind"], last["message"], last["attempt"]) == ("run_cancelled", "cancelled at step 1", 1)
    ledger = record.run.read_json("ledger.json")
    assert sum(ledger["totals"].values()) == pytest.approx(ledger["wall_seconds"])
    assert ledger["overall"]["goodput"] == pytest.approx(ledger["totals"]["productive"] / ledger["wall_seconds"])
    sampled = list(record.run.read_lines("ledger.jsonl"))
    assert len(sampled) == 5  # as often as its state changed
    assert {key: sampled[-1][key] for key in ledger["totals"]} == pytest.approx(ledger["totals"], abs=0.1)


def test_attempts_count_on_over_sessions(record: RunRecord) -> None:
    for rank in range(3):
        record.report(step_report(5, rank))
    record.end("interrupted", "")
    again = new_record(record.run.place)
    assert again.attempt == 1
    again.begin_attempt(dict.fromkeys(range(4), "host-0"))
    assert again.attempt == 2
    again.report(step_report(5, 3, attempt=2))  # what the others said in attempt 1 does not complete it
    assert lines(again) == []
    again.event(Event(kind="training_started", message="", attempt=2, data={"start_step": 4}))
    assert again.step == 4


def test_an_event_of_no_attempt_belongs_to_the_present_one(record: RunRecord) -> None:
    record.event(Event(kind="stopping", message=""))
    (event,) = record.run.read_lines("events.jsonl")
    assert event["attempt"] == 1


def test_only_steps_that_nobody_heard_of_are_caught_up_with(record: RunRecord) -> None:
    for rank in range(4):
        record.report(step_report(1, rank))
    heard: list[Any] = []
    record.listen(heard.append)
    record.catch_up([step_report(step) for step in (1, 2, 3)])
    record.catch_up([step_report(2), step_report(3), step_report(3, attempt=2)])
    assert [(line["attempt"], line["step"]) for line in lines(record)] == [(1, 1), (1, 2), (1, 3), (2, 3)]
    assert lines(record)[1] == lines(record)[0] | metrics_line(2, memory_bytes=300_000_000)
    assert heard == []


def test_status_is_written_now_and_then(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic() + 100
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    record.confirm()
    before = record.run.read_json("status.json")["updated_at"]
    record.confirm()
    assert record.run.read_json("status.json")["updated_at"] == before
    now += module._LOCAL_CONFIRM_SECONDS
    record.confirm()
    assert record.run.read_json("status.json")["updated_at"] > before


def test_a_status_that_cannot_be_written_does_not_end_training(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(RunFolder, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        record.set_state("running")
    assert status_of(record.run)["state"] == "starting"
    record.confirm()  # at once, and not half a second after the one that failed
    assert status_of(record.run)["state"] == "running"


# Who is alive.


def dead_pid() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


HERE = socket.gethostname()


@pytest.mark.parametrize("state", ["queued", "starting", "running", "stopping"])
def test_a_run_whose_controller_is_dead_is_orphaned(tmp_path: Path, state: str) -> None:
    run = make_run(str(tmp_path / "a"), state=state, controller={"host": HERE, "pid": dead_pid()})
    assert status_of(run) | {"updated_at": 0} == run.read_json("status.json") | {
        "updated_at": 0,
        "state": "orphaned",
        "reason": "its controller died",
    }


@pytest.mark.parametrize("state", ["done", "failed", "cancelled", "interrupted"])
def test_a_run_that_ended_is_not_orphaned(tmp_path: Path, state: str) -> None:
    run = make_run(str(tmp_path / "a"), state=state, updated_at=0.0, controller={"host": HERE, "pid": dead_pid()})
    assert status_of(run)["state"] == state


@pytest.mark.parametrize(
    ("controller", "silent_seconds", "alive"),
    [
        ({"host": HERE, "pid": os.getpid()}, 0, True),
        ({"host": HERE, "pid": os.getpid()}, ORPHANED_SECONDS + 1, False),  # the pid is somebody else's by now
        ({"host": "another-host", "pid": 1}, ORPHANED_SECONDS - 5, True),
        ({"host": "another-host", "pid": 1}, ORPHANED_SECONDS + 1, False),
        (None, UNBORN_SECONDS - 5, True),  # submitted; its Ray job has not begun
        (None, UNBORN_SECONDS + 1, False),
    ],
)
def test_a_controller_is_judged_by_its_last_word(
    tmp_path: Path, controller: dict[str, Any] | None, silent_seconds: float, alive: bool
) -> None:
    run = make_run(str(tmp_path / "a"), state="running", controller=controller, updated_at=time.time() - silent_seconds)
    assert status_of(run)["state"] == ("running" if alive else "orphaned")
