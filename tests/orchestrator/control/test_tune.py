"""What a tune decides, with layouts that are not really run: a machine whose steps take what a model says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_runs import event_line, job, make_run, metrics_line

from jobs.compose import compose
from jobs.errors import InputError
from jobs.spec import JobSpec
from orchestrator.control import calibrated, trials
from orchestrator.control.controller import CANCEL_REQUEST
from orchestrator.control.measured import FILE, Store
from orchestrator.control.tune import Candidate, Limits, Run, Trial, Tuning, command, trial_job, tune
from parallel.estimates.costs import estimate_time
from parallel.estimates.software import Software
from parallel.estimates.workload import Workload
from parallel.planning import planner
from parallel.planning.explanation import explain
from parallel.planning.planner import Plan, device_of, plan_job

TRUTH = Software(compute=1.6, memory=2.0, launch=6.0, network=1.5)
"""Of the machine that is tuned on, whose profile knows nothing of it."""

ENOUGH = Limits(trials=5, steps=4, seconds=1e9)


class Told:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.outcomes: list[str] = []

    def begins(self, tuning: Tuning) -> None: ...

    def trial_begins(self, candidate: Candidate, number: int) -> None:
        self.tried.append(candidate.label)

    def trial_ended(self, candidate: Any, row: Any, number: int) -> None:
        self.outcomes.append(row.outcome)


@pytest.fixture
def tuned(tmp_path: Path) -> Callable[..., tuple[Tuning, Told, str]]:
    """Tunes quickstart with a `run`, going on from what is kept in one run root."""
    spec = compose("quickstart")
    (tmp_path / "runs").mkdir()

    def once(run: Run, limits: Limits = ENOUGH) -> tuple[Tuning, Told, str]:
        tuning, told = Tuning(spec, Store(str(tmp_path / "runs"), spec)), Told()
        return tuning, told, tune(tuning, limits, run, told)

    return once


def seconds_of(spec: JobSpec, plan: Plan) -> float:
    return estimate_time(Workload.of(spec, plan.layout, plan.micro_batch), device_of(spec), TRUTH).total


def ran(spec: JobSpec, plan: Plan, patience: float) -> Trial:
    return Trial("run", "ran", seconds=seconds_of(spec, plan), memory_bytes=10**8)


def test_a_tune_finds_what_is_fast_and_says_how_fast(tuned: Any) -> None:
    tuning, told, _ = tuned(ran)
    assert 1 < len(told.tried) <= ENOUGH.trials
    assert len(set(told.tried)) == len(told.tried)
    found = tuning.candidates
    true = np.array([seconds_of(tuning.job, each.plan) for each in found])
    before = np.abs([each.profile_seconds for each in found] / true - 1).mean()
    after = np.abs([each.seconds for each in found] / true - 1).mean()
    assert after < before / 3
    assert seconds_of(tuning.job, tuning.best.plan) < 1.03 * true.min()
    low, high = np.transpose([each.interval for each in found])
    assert np.mean((low <= true) & (true <= high)) > 0.8


def test_what_breaks_is_an_observation_and_the_tune_goes_on(tuned: Any) -> None:
    broken = ["out of memory", "hung", "failed"]
    outcomes = list(broken)

    def breaks(spec: JobSpec, plan: Plan, patience: float) -> Trial:
        return Trial("run", outcomes.pop(0), "as is said") if outcomes else ran(spec, plan, patience)  # type: ignore[arg-type]

    tuning, told, reason = tuned(breaks)
    assert told.outcomes == [*broken, "ran", "ran"]
    assert reason == "5 of 5 trials are done"
    assert tuning.best.ran
    assert [each.row.outcome for each in tuning.candidates[-3:]] != ["ran"] * 3
    assert {each.row.outcome for each in tuning.candidates if each.row} == {*broken, "ran"}
    # What ran out of memory is known to; what hung or failed may do better another day.
    _, later, _ = tuned(ran, replace(ENOUGH, trials=16))
    assert not set(later.tried) & {told.tried[0], *told.tried[3:]}


def test_nothing_runs(tuned: Any) -> None:
    limits = Limits(trials=30, steps=1, seconds=1e9)
    tuning, told, reason = tuned(lambda *_: Trial("run", "failed", "no GPU"), limits)
    assert (tuning.best, reason) == (None, "no candidate ran")
    assert len(told.tried) == len(set(told.tried)) == len(tuning.plans)


def test_an_interrupted_tune_goes_on_where_it_was(tuned: Any) -> None:
    left = [1, 2]

    def interrupted(spec: JobSpec, plan: Plan, patience: float) -> Trial:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return ran(spec, plan, patience)

    with pytest.raises(KeyboardInterrupt):
        tuned(interrupted)
    _, told, _ = tuned(ran)
    assert len(told.tried) <= ENOUGH.trials - 2
    again = tuned(ran)
    assert again[1].tried == []
    assert again[0].best.ran


def test_a_tune_keeps_to_its_budget(tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("orchestrator.control.tune.time.monotonic", lambda: now[0])

    def slow(spec: JobSpec, plan: Plan, patience: float) -> Trial:
        now[0] += 40
        return ran(spec, plan, patience)

    _, told, reason = tuned(slow, Limits(trials=9, steps=4, seconds=60))
    assert len(told.tried) == 2
    assert reason == "the budget of 60 s is spent"


def test_patience_follows_from_the_prediction(tuned: Any) -> None:
    waited = []

    def counted(spec: JobSpec, plan: Plan, patience: float) -> Trial:
        waited.append(patience)
        return replace(ran(spec, plan, patience), seconds=100 * seconds_of(spec, plan))

    tuned(counted)
    assert waited[0] == 60
    assert waited[-1] > 100


def test_a_trial_is_the_job_for_a_few_steps() -> None:
    spec = job("fault.kill_rank=1")
    trial = trial_job(spec, 3)
    assert (trial.model, trial.layout, trial.train.global_batch) == (spec.model, spec.layout, spec.train.global_batch)
    assert (trial.train.steps, trial.train.eval_batches, trial.checkpoint.interval) == (3, 0, 0)
    assert (trial.policy.max_restarts, trial.fault.kill_rank) == (0, None)
    assert trial.name == "quickstart-tune"


def test_the_command_trains_with_the_plan() -> None:
    spec = compose("llama3_8b", ["cluster=a100_x8"])
    plan = next(plan for plan in plan_job(spec).plans if plan.options["recompute"] == "selective")
    text = command("run", "llama3_8b", ["cluster=a100_x8", "train.steps=7", "layout.tp=1"], spec, plan)
    verb, name, *overrides = shlex.split(text)[1:]
    assert (verb, name) == ("run", "llama3_8b")
    found = compose(name, overrides)
    assert found.train.steps == 7
    (planned,) = plan_job(found).plans
    assert (planned.layout, planned.micro_batch, planned.options) == (plan.layout, plan.micro_batch, plan.options)


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("failed", "rank 0 failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        ("failed", "rank 0 failed: RuntimeError: NCCL error", "failed"),
        ("orphaned", None, "failed"),
        ("done", None, "ran"),
    ],
)
def test_what_a_runs_folder_says(tmp_path: Path, state: str, reason: str | None, expected: str) -> None:
    run = make_run(str(tmp_path / "t"), state=state, reason=reason)
    if state == "done":
        seconds = (9.0, 5.0, 2.0, 2.2, 2.1)
        run.append("metrics.jsonl", [metrics_line(at, step_seconds=each) for at, each in enumerate(seconds, 1)])
    found = trials.outcome(run, job(), None)
    assert found.outcome == expected
    if expected == "ran":
        assert found.seconds == 2.1
        assert 0.01 < found.deviation < 0.1
    assert trials.outcome(run, job(), 60.0).outcome == "hung"


def test_a_silent_run_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given time to start, and then for each step what is patience for one."""
    monkeypatch.setattr(trials, "_LOOK_SECONDS", 0.001)
    run = make_run(str(tmp_path / "t"), state="running")
    run.append("events.jsonl", [event_line("nodes_requested", "")])
    with trials._watched(run, 0.0) as hung:
        run.append("events.jsonl", [event_line("nodes_ready", "")])
        assert not hung
        run.append("metrics.jsonl", [metrics_line(1)])
        for _ in range(2000):
            if run.exists(CANCEL_REQUEST):
                break
            trials.time.sleep(0.001)
    assert hung == [True]
    assert run.exists(CANCEL_REQUEST)


def test_the_store_is_read_as_it_was_written(tuned: Any, tmp_path: Path) -> None:
    tuning, _, _ = tuned(ran)
    spec = tuning.job
    root = str(tmp_path / "runs")
    assert Store(root, spec).rows == tuning.store.rows
    assert Store(root, spec.model_copy(update={"engine": "deepspeed"})).rows == []
    fewer = spec.cluster.model_copy(update={"devices_per_node": 2})
    assert Store(root, spec.model_copy(update={"cluster": fewer})).rows == []
    file = tmp_path / "runs" / FILE
    line = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps(line | {"workload": line["workload"] | {"micro_batch": "two"}}) + "\n")
    with pytest.raises(InputError, match=r"measured.jsonl: line 1 is no measured layout: workload.micro_batch: "):
        Store(root, spec)


def test_later_plans_are_made_with_what_is_kept(tuned: Any, tmp_path: Path) -> None:
    tuning, _, _ = tuned(ran)
    spec = tuning.job
    plans = calibrated.plan(spec, tuning.store).plans
    best = plans[0]
    assert (best.layout, best.micro_batch) == (tuning.best.plan.layout, tuning.best.plan.micro_batch)
    low, high = best.interval
    assert low < seconds_of(spec, best) < high < 1.1 * low
    assert best.time.total == pytest.approx(tuning.best.seconds)
    assert best.tokens_per_second == pytest.approx(16 * 128 / best.time.total)
    shipped = calibrated.plan(spec, Store(str(tmp_path / "nothing"), spec)).plans
    assert {plan.layout for plan in shipped} == {plan.layout for plan in plans}
    assert shipped == planner.plan_job(spec).plans
    # A neighbour's gain is told by the same residuals.
    found = explain(spec, best, tuning.device, calibrated.residuals(spec, tuning.store))
    there = next(each.plan for each in found.neighbours if each.plan is not None)
    assert there.time.fixed == best.time.fixed
