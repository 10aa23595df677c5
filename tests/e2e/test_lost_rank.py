"""A rank's death, from within and from outside: seen, survived, and without a trace in what is trained."""

from __future__ import annotations

import random
import signal

import pytest
from command import INTERVAL, JOB, STEPS, Fivefold, assert_same_curve, kill_rank, kinds, metrics, reached, until
from command import seconds_to_next_step as recovery

from orchestrator.run_folder import RunFolder

LAST_KILL = STEPS - 4
"""Late enough to lose work, and with steps left in which the test can do it."""


def test_killed_by_an_injected_fault_and_then_stopped_from_outside(
    fivefold: Fivefold, reference: dict[int, tuple[float, float]]
) -> None:
    seed = random.randrange(1 << 32)
    step, rank = random.Random(seed).randint(INTERVAL * 2 + 1, LAST_KILL), random.Random(seed).randrange(4)
    print(f"seed {seed}: rank {rank} is stopped from outside after step {step}")
    started = fivefold.start("run", JOB, "fault.kill_rank=1", "fault.at_step=7")
    run = fivefold.run_of(started)
    until(reached(run, 5, attempt=2), 60, "second attempt", started)
    status = fivefold.ask("status", run.run_id).document
    assert (status["state"], status["attempt"], len(status["ranks"])) == ("running", 2, 4)
    here = fivefold.survivors(0)
    assert sum("orchestrator.node.zygote" in command for command in here) == 5, here  # itself and four ranks
    assert any("ray::NodeAgent" in command for command in here), here  # so that none would go unseen if it stayed
    until(reached(run, step, attempt=2), 30, f"step {step}", started)
    stopped_at = kill_rank(run, rank, signal.SIGSTOP)
    answer = started.finish()

    assert answer.code == 0, answer.told
    assert answer.document["attempts"] == 3
    assert_same_curve(run, reference)
    assert [kind for kind in kinds(run) if kind in ("fault_injected", "attempt_failed", "restarting", "run_done")] == [
        "fault_injected",
        "attempt_failed",
        "restarting",
        "attempt_failed",
        "restarting",
        "run_done",
    ]
    assert_little_is_trained_twice(run)
    assert "rank 1 was ended by SIGKILL" in answer.told
    (hung,) = [event for event in run.read_lines("events.jsonl") if event["kind"] == "rank_hung"]
    assert (hung["rank"], hung["data"]["kind"]) == (rank, "stopped")
    assert hung["at"] - stopped_at < 15  # 5 s, or five times what a step takes here
    for each in range(4):
        assert "train (orchestrator/worker/main.py" in run.read(f"logs/attempt-2/rank-{each}.stack.txt").decode()
    injected_at = next(event["at"] for event in run.read_lines("events.jsonl") if event["kind"] == "fault_injected")
    figures = recovery(run, injected_at, 2), recovery(run, hung["at"], 3)
    print("seconds to the next step: {:.2f} from an injected kill, {:.2f} from a stop's notice".format(*figures))
    assert max(figures) < 5
    assert run.read_json("ledger.json")["totals"]["rework"] > 0


@pytest.mark.slow
def test_killed_five_times_at_random_steps(fivefold: Fivefold, reference: dict[int, tuple[float, float]]) -> None:
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    started = fivefold.start("run", JOB, "policy.max_restarts=5")
    run = fivefold.run_of(started)
    killed_at = []
    for attempt in range(1, 6):
        until(reached(run, 1, attempt), 60, f"attempt {attempt}", started)
        step = draw.randint(min(metrics(run)[-1]["step"], LAST_KILL), LAST_KILL)
        until(reached(run, step, attempt), 30, f"step {step}", started)
        rank = draw.randrange(4)
        killed_at.append(kill_rank(run, rank))
        print(f"seed {seed}: attempt {attempt}, rank {rank} is killed after step {step}")
    answer = started.finish()

    assert answer.code == 0, answer.told
    assert answer.document["attempts"] == 6
    assert_same_curve(run, reference)
    assert_little_is_trained_twice(run)
    figures = [recovery(run, when, attempt) for attempt, when in enumerate(killed_at, 2)]
    print("seconds from kill to next step:", " ".join(f"{seconds:.2f}" for seconds in figures))
    assert max(figures) < 5


def assert_little_is_trained_twice(run: RunFolder) -> None:
    """No attempt goes back further than to the newest checkpoint."""
    lines = metrics(run)
    for attempt in range(2, lines[-1]["attempt"] + 1):
        before = max(line["step"] for line in lines if line["attempt"] == attempt - 1)
        after = min(line["step"] for line in lines if line["attempt"] == attempt)
        assert before - after < INTERVAL
