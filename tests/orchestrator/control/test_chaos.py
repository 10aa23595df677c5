"""What is drawn, and what is right: `fivefold chaos` without a run."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from sample_runs import event_line, job, make_checkpoint, make_run, metrics_line

from jobs.errors import InputError
from jobs.injections import KINDS, Injection
from orchestrator import manifests
from orchestrator.control import session
from orchestrator.control.chaos import scorecard
from orchestrator.control.chaos_expectations import RULES, judge
from orchestrator.control.chaos_schedule import CATALOGUE, chosen, draw
from orchestrator.control.controller import injected
from orchestrator.control.injector import Injector, damage
from orchestrator.control.record import RunRecord
from orchestrator.messages import Event
from parallel.layout import Layout

KILL = Injection(kind="kill", rank=1, step=6)


def event(kind: str, at: float, message: str = "", attempt: int = 1, rank: int | None = None, **data: Any) -> Any:
    return event_line(kind, message, attempt, at, **data) | {"rank": rank}


def killed(rank: int = 1, start_step: int = 4) -> list[Any]:
    return [
        event("fault_injected", 10.0, rank=1, injection=0),
        event("rank_exited", 10.5, f"rank {rank} was ended by SIGKILL", rank=rank, code=-9),
        event("attempt_failed", 10.6, f"step 6: rank {rank} was ended by SIGKILL", failure="rank_died"),
        event("restarting", 10.7),
        event("training_started", 11.0, attempt=2, rank=0, start_step=start_step),
    ]


LINES = [metrics_line(step) for step in range(1, 7)]


def test_every_kind_has_its_rule_and_can_be_drawn() -> None:
    assert set(RULES) == set(KINDS) == {entry.kind for entry in CATALOGUE}
    assert len(CATALOGUE) >= 24


def test_a_fault_that_is_found_named_and_answered() -> None:
    verdict = judge(0, KILL, killed(), LINES, 4)
    assert verdict.right
    assert (verdict.found, verdict.seconds, verdict.decision, verdict.steps_lost) == ("rank_exited", 0.5, "restart", 2)


@pytest.mark.parametrize(
    "events",
    [
        [],
        killed()[:1],
        killed(rank=0),
        killed(start_step=1),
        [each for each in killed() if each["kind"] != "restarting"],
        [each | {"data": each["data"] | {"failure": "node_lost"}} for each in killed()],
    ],
    ids=["not injected", "missed", "another rank", "too many steps lost", "no decision", "another class"],
)
def test_what_is_wrong(events: list[Any]) -> None:
    assert not judge(0, KILL, events, LINES, 4).right


def test_what_follows_another_fault_is_not_this_ones() -> None:
    events = [event("fault_injected", 9.0, rank=1, injection=1), *killed()]
    assert not judge(1, KILL, events, LINES, 4).right
    assert judge(0, KILL, events, LINES, 4).right


def test_a_schedule_is_its_seeds_and_fits_its_job() -> None:
    spec = job("train.steps=700", "checkpoint.interval=10")
    drawn = draw(spec, CATALOGUE, len(CATALOGUE), 5)
    assert drawn == draw(spec, CATALOGUE, len(CATALOGUE), 5) != draw(spec, CATALOGUE, len(CATALOGUE), 6)
    assert sorted(fault.kind for fault in drawn) == sorted(entry.kind for entry in CATALOGUE)
    assert all(fault.step % 10 and fault.rank < 4 for fault in drawn)
    assert len({fault.step for fault in drawn}) == len(drawn)
    session.check_fault(spec.model_copy(update={"chaos": drawn}))


def test_schedules_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"train.steps=20: has no room for .* nearest valid: \d+") as caught:
        draw(job("train.steps=20", "checkpoint.interval=5"), CATALOGUE, 30, 1)
    assert len(draw(job(f"train.steps={caught.value.nearest}", "checkpoint.interval=5"), CATALOGUE, 30, 1)) == 30
    with pytest.raises(InputError, match=r"checkpoint\.interval=0"):
        draw(job("checkpoint.interval=0"), CATALOGUE, 1, 1)
    with pytest.raises(InputError, match=r"--kinds=segfalt: .* nearest valid: segfault"):
        chosen(["kill", "segfalt"])


@pytest.mark.parametrize("changes", [{"rank": 4}, {"step": 101}])
def test_faults_that_would_never_happen_are_refused(changes: dict[str, int]) -> None:
    spec = job("train.steps=100").model_copy(update={"chaos": (KILL, KILL.model_copy(update=changes))})
    with pytest.raises(InputError, match=rf"chaos\.1\.{next(iter(changes))}="):
        session.check_fault(spec)


@pytest.mark.parametrize("kind", ["byte_flipped", "truncated", "deleted"])
def test_a_damaged_file_is_one_that_verification_finds(tmp_path: Path, kind: Any) -> None:
    run = make_run(str(tmp_path / "run"))
    entries = make_checkpoint(run, 20).files
    named = damage(run, 20, Injection(kind=kind))
    found = {entry.name: manifests.damage(run, 20, entry) for entry in entries}
    assert [name for name, problem in found.items() if problem] == [named]


def test_a_card_is_right_only_with_the_loss_of_the_undisturbed_run(tmp_path: Path) -> None:
    calm, stormy = make_run(str(tmp_path / "calm")), make_run(str(tmp_path / "stormy"))
    for run in (calm, stormy):
        run.append("metrics.jsonl", LINES)
    stormy.append("events.jsonl", killed())
    assert scorecard([KILL], 4, calm, stormy)["all_right"]
    stormy.append("metrics.jsonl", [metrics_line(6, attempt=2, loss=4.4000001)])
    card = scorecard([KILL], 4, calm, stormy)
    assert (card["right"], card["same_loss"], card["all_right"]) == (1, False, False)
    stormy.append("events.jsonl", [event("replanned", 12.0)])  # and then within rounding
    assert scorecard([KILL], 4, calm, stormy)["all_right"]


def test_two_damages_due_at_once_are_done_to_two_checkpoints(tmp_path: Path) -> None:
    victim = subprocess.Popen(["sleep", "60"])
    try:
        run = make_run(str(tmp_path / "run"), step=20)
        for step in (20, 30):
            make_checkpoint(run, step)
        record = RunRecord(run, Layout(), "here", lambda rate, world: {})
        faults = tuple(Injection(kind=kind, step=3) for kind in ("truncated", "deleted"))
        record.listen(Injector(record, faults))
        run.write_json("status.json", {"ranks": [{"pid": victim.pid}]})
        for step in (20, 30):
            record._confirmed = time.monotonic()  # status.json stays as it is
            record.event(Event(kind="checkpoint_written", message="", data={"step": step}))
            assert [place for place in (0, 1) if place in injected(run)] == list(range(step // 10 - 1))
        assert victim.wait(10) == -signal.SIGKILL
    finally:
        victim.kill()
        victim.wait()
    told = [each["data"] for each in run.read_lines("events.jsonl") if each["kind"] == "fault_injected"]
    assert [each["checkpoint"] for each in told] == [20, 30]
