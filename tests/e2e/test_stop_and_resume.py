"""Runs that are stopped: by the user, by their budget, by the death of their controller. All of them can go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import JOB, STEPS, Fivefold, assert_same_curve, kinds, metrics, reached, until

from orchestrator.run_folder import RunFolder
from parallel.layout import Layout


def test_cancelled_then_trained_to_the_end_by_orphans_and_nothing_twice(
    fivefold: Fivefold, reference: dict[int, tuple[float, float]]
) -> None:
    started = fivefold.start("run", JOB)
    run = fivefold.run_of(started)
    until(reached(run, 2), 60, "step 2", started)
    refused = fivefold.ask("resume", run.run_id)
    assert (refused.code, "its controller is pid" in refused.told) == (2, True)
    cancelled = fivefold.ask("cancel", run.run_id)
    assert (cancelled.code, cancelled.document["state"]) == (0, "cancelled")
    answer = started.finish()
    assert (answer.code, answer.document["state"]) == (130, "cancelled"), answer.told
    assert checkpoints_written(run)[-1] == answer.document["step"] < STEPS
    assert {rank["state"] for rank in run.read_json("status.json")["ranks"]} == {"left"}
    again = fivefold.ask("cancel", run.run_id)
    assert (again.code, "is not running" in again.told) == (2, True)

    started = fivefold.start("resume", run.run_id)
    until(reached(run, STEPS - 2, attempt=2), 60, "the end", started)
    started.kill()
    heard = max(line["step"] for line in metrics(run))
    status = fivefold.ask("status", run.run_id).document
    assert (status["state"], status["reason"]) == ("orphaned", "its controller died")
    answer = fivefold("resume", run.run_id)
    assert answer.code == 0, answer.told
    print(f"the controller was killed after step {heard}; its ranks trained on to step {STEPS}")
    assert (answer.document["state"], answer.document["step"], answer.document["attempts"]) == ("done", STEPS, 2)
    assert fivefold.ask("status", run.run_id).document["step"] == STEPS
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    assert_same_curve(run, reference)
    ended = fivefold.ask("resume", run.run_id)
    assert (ended.code, f"all {STEPS} steps of {run.run_id} are trained" in ended.told) == (2, True)


def test_interrupted_then_out_of_budget_then_damaged_and_done_at_another_layout(
    fivefold: Fivefold, reference: dict[int, tuple[float, float]]
) -> None:
    started = fivefold.start("run", JOB)
    run = fivefold.run_of(started)
    until(reached(run, 2), 60, "step 2", started)
    started.interrupt()
    answer = started.finish()
    assert (answer.code, answer.document.get("state")) == (130, "interrupted")
    assert checkpoints_written(run)[-1] == answer.document["step"] < 8

    answer = fivefold("resume", run.run_id, "policy.max_restarts=0", "fault.kill_rank=2", "fault.at_step=10")
    assert (answer.code, answer.document.get("state")) == (3, "failed")
    assert "rank 2 was ended by SIGKILL (1 failed attempts in 24 h, policy.max_restarts=0)" in answer.document["reason"]
    assert fivefold.ask("status", run.run_id).document["reason"] == answer.document["reason"]
    newest = checkpoints_written(run)[-1]
    assert newest == 8

    damaged = flip_a_byte(run, newest)
    verified = fivefold.ask("checkpoint", "verify", run.run_id)
    assert verified.code == 3
    assert [each["step"] for each in verified.document["checkpoints"] if not each["whole"]] == [newest]
    answer = fivefold("resume", run.run_id, "layout.pp=2", "layout.tp=1", "layout.ep=2")
    assert answer.code == 0, answer.told
    told = next(event for event in run.read_lines("events.jsonl") if event["kind"] == "checkpoint_damaged")
    assert damaged in told["message"]
    third = [line for line in metrics(run) if line["attempt"] == 3]
    assert [line["step"] for line in third] == list(range(checkpoint_before(run, newest) + 1, STEPS + 1))
    assert fivefold.ask("status", run.run_id).document["layout"] == Layout(dp=2, pp=2, ep=2).as_dict()
    for line in third:
        assert line["loss"] == pytest.approx(reference[line["step"]][0], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(reference[line["step"]][1], rel=1e-3)
    assert [kind for kind in kinds(run) if kind.startswith("run_")] == ["run_interrupted", "run_failed", "run_done"]
    assert fivefold.ask("checkpoint", "verify", run.run_id).code == 0


def checkpoint_before(run: RunFolder, step: int) -> int:
    return max(other for other in checkpoints_written(run) if other < step)


def checkpoints_written(run: RunFolder) -> list[int]:
    events = run.read_lines("events.jsonl")
    return [event["data"]["step"] for event in events if event["kind"] == "checkpoint_written"]


def flip_a_byte(run: RunFolder, step: int) -> str:
    """Damage the largest file of a checkpoint without changing its size; returns its name."""
    folder = Path(run.place) / f"checkpoints/step-{step:08d}"
    path = max(folder.glob("*.distcp"), key=lambda each: each.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name
