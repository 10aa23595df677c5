"""`fivefold tune`: plan, run for a few steps what teaches most, calibrate, and stop when the choice is clear.

What decides is here; control/trials.py runs a layout, and control/tune_display.py tells of it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jobs.spec import DEGREES, FaultSpec, JobSpec
from orchestrator.control import calibrated
from orchestrator.control.measured import Measured, Outcome, Store
from parallel.estimates.costs import estimate_time
from parallel.estimates.memory import LIKELY_OUT
from parallel.estimates.workload import Workload
from parallel.evidence.calibration import RESIDUALS, Belief, Calibration, MemoryCalibration, next_run, settled
from parallel.planning import planner
from parallel.planning.options import variants

CANDIDATES = 16
"""Layouts, the fastest by what is known before, among which a tune chooses."""

PATIENCE = 10.0
"""Steps' seconds, of those that a step should take at most, for which nothing may be heard of a trial."""

LEAST_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    """Of a tune. Layouts measured before count as trials."""

    trials: int
    steps: int
    """Of a trial."""
    seconds: float
    """After which no trial begins."""


@dataclass(frozen=True)
class Trial:
    """What became of a layout that was run."""

    run_id: str
    outcome: Outcome
    reason: str = ""
    seconds: float | None = None
    deviation: float = 0.0
    memory_bytes: int | None = None


Run = Callable[[JobSpec, planner.Plan, float], Trial]
"""Runs a job at a plan, waiting for each step at most so many seconds. KeyboardInterrupt where the user stopped it."""


class Listener(Protocol):
    """Is told how a tune goes."""

    def begins(self, tuning: Tuning) -> None: ...
    def trial_begins(self, candidate: Candidate, number: int) -> None: ...
    def trial_ended(self, candidate: Candidate, row: Measured, number: int) -> None: ...


@dataclass(frozen=True)
class Candidate:
    """A plan, what is believed of it, and what it came to."""

    plan: planner.Plan
    workload: Workload
    profile_seconds: float
    """A step's, from the profile and the shipped residuals alone."""
    seconds: float
    """With all that was measured."""
    interval: tuple[float, float]
    p_out_of_memory: float
    row: Measured | None
    """Its newest, where it was run."""

    @property
    def ran(self) -> bool:
        return self.row is not None and self.row.outcome == "ran"

    @property
    def label(self) -> str:
        return f"{self.plan.label}, mb {self.plan.micro_batch}"


class Tuning:
    """The state of a tune: all of it follows from the job and the store."""

    def __init__(self, job: JobSpec, store: Store) -> None:
        self.job, self.store = job, store
        self.device = planner.device_of(job)
        planned = calibrated.plan(job, store).plans
        self.fitting = len(planned)
        measured = {row.workload for row in store.rows}
        steps = [planner.step_of(job, plan) for plan in planned]
        chosen = [at for at, step in enumerate(steps) if at < CANDIDATES or step in measured]
        self.plans = [planned[at] for at in chosen]
        self.workloads = [steps[at] for at in chosen]
        self._run_now: set[Workload] = set()
        self._update()

    @property
    def candidates(self) -> list[Candidate]:
        """Those that ran and may run, fastest first; then those that do not."""
        found = [
            Candidate(
                plan=plan,
                workload=workload,
                profile_seconds=estimate_time(workload, self.device).total,
                seconds=float(self.belief.seconds[at]),
                interval=self.belief.interval(at),
                p_out_of_memory=self.p_out[at],
                row=self._rows.get(workload),
            )
            for at, (plan, workload) in enumerate(zip(self.plans, self.workloads, strict=True))
        ]
        return sorted(found, key=lambda each: (each.row is not None and not each.ran, each.seconds))

    @property
    def trials(self) -> int:
        """Candidates whose outcome is known."""
        return len(self.workloads) - len(self._open())

    @property
    def best(self) -> Candidate | None:
        """The fastest of those that ran."""
        return next((each for each in self.candidates if each.ran), None)

    def stop(self, limits: Limits, spent: float) -> str | None:
        """Why no further trial is wanted."""
        open_, ran = self._open(), self._ran()
        if not open_:
            return "every candidate was run" if ran else "no candidate ran"
        if ran:
            best = min(ran, key=lambda at: self.belief.mean[at])
            rest = [best, *(at for at in open_ if self.p_out[at] <= LIKELY_OUT)]
            if settled(self._of(rest), 0):
                return "no other candidate is likely to be faster by more than a repeat differs"
        if self.trials >= limits.trials:
            return f"{self.trials} of {limits.trials} trials are done"
        if spent >= limits.seconds:
            return f"the budget of {limits.seconds:g} s is spent"
        return None

    def choose(self, limits: Limits) -> Candidate:
        """The candidate to run next: the one that lessens most what the choice is expected to lose.

        The last trial is of the one that is believed fastest, unless that ran: what is chosen has been run. Where none
        is likely to fit, any may be next.
        """
        open_ = self._open()
        open_ = [at for at in open_ if self.p_out[at] <= LIKELY_OUT] or open_
        among = [*self._ran(), *open_]
        fastest = min(among, key=lambda at: self.belief.mean[at])
        if fastest in open_ and (self.trials + 1 >= limits.trials or settled(self._of(among), among.index(fastest))):
            found = fastest
        else:
            positions = range(len(among) - len(open_), len(among))
            found = among[next_run(self._of(among), [self.p_out[at] for at in among], positions)]
        return next(each for each in self.candidates if each.workload == self.workloads[found])

    def record(self, candidate: Candidate, trial: Trial) -> Measured:
        """Keep what a trial came to, and learn from it."""
        row = Measured(
            run_id=trial.run_id,
            job=self.job.name,
            device=self.store.device,
            version=self.store.version,
            workload=candidate.workload,
            outcome=trial.outcome,
            reason=trial.reason,
            predicted_seconds=candidate.profile_seconds,
            believed_seconds=candidate.seconds,
            seconds=trial.seconds,
            deviation=trial.deviation,
            memory_bytes=trial.memory_bytes,
        )
        self.store.add(row)
        self._run_now.add(candidate.workload)
        self._update()
        return row

    def _update(self) -> None:
        observations = self.store.observations
        self._rows = {row.workload: row for row in self.store.rows}
        self.calibration = Calibration(self.device, self.workloads[0].software, observations)
        self.belief = self.calibration.believe(self.workloads)
        memory = MemoryCalibration(self.device, observations)
        self.p_out = [memory.of(workload)[1] for workload in self.workloads]

    def _of(self, indices: Sequence[int]) -> Belief:
        """What is believed of some candidates."""
        mean, covariance = self.belief.mean, self.belief.covariance
        return Belief(mean[indices], covariance[indices][:, indices])

    def _open(self) -> list[int]:
        """Not run yet. What failed or hung in an earlier tune may be that day's fault: it is tried again."""
        known = {step for step, row in self._rows.items() if row.outcome in ("ran", "out of memory")}
        return [at for at, step in enumerate(self.workloads) if step not in known | self._run_now]

    def _ran(self) -> list[int]:
        ran = {step for step, row in self._rows.items() if row.outcome == "ran"}
        return [at for at, step in enumerate(self.workloads) if step in ran]


def tune(tuning: Tuning, limits: Limits, run: Run, listener: Listener) -> str:
    """Run candidates until the choice is clear or a limit is reached; why it ended."""
    began = time.monotonic()
    listener.begins(tuning)
    while (reason := tuning.stop(limits, time.monotonic() - began)) is None:
        candidate = tuning.choose(limits)
        number = tuning.trials + 1
        listener.trial_begins(candidate, number)
        job = trial_job(planner.resolve(tuning.job, candidate.plan), limits.steps)
        patience = max(LEAST_PATIENCE_SECONDS, PATIENCE * candidate.interval[1])
        listener.trial_ended(candidate, tuning.record(candidate, run(job, candidate.plan, patience)), number)
    return reason


def trial_job(job: JobSpec, steps: int) -> JobSpec:
    """The job for a few steps of its full size, without validation, checkpoints, second attempts or injected faults."""
    train = job.train.model_copy(update={"steps": steps, "eval_batches": 0})
    policy = job.policy.model_copy(update={"max_restarts": 0, "grace_seconds": 10.0})
    checkpoint = job.checkpoint.model_copy(update={"interval": 0})
    changes = {"name": f"{job.name[:58]}-tune", "train": train, "policy": policy, "checkpoint": checkpoint}
    return job.model_copy(update={**changes, "fault": FaultSpec()})


def command(verb: str, name: str, overrides: Sequence[str], job: JobSpec, plan: planner.Plan) -> str:
    """The command line that trains with a plan of `job`, which `name` and the overrides made."""
    chosen = {axis: plan.layout.degree(axis) for axis in DEGREES} | {"micro_batch": plan.micro_batch}
    ways = [way.layout.options for way in variants(job)]
    for option, value in plan.options.items():
        if value != () and any(way.get(option) != value for way in ways):
            chosen[option] = value
    free = [each for each in overrides if each.partition("=")[0] not in {f"layout.{field}" for field in chosen}]
    return " ".join(
        ["fivefold", verb, name, *free, *(f"layout.{field}={_shown(value)}" for field, value in chosen.items())]
    )


def _shown(value: Any) -> str:
    """As an override is written in a shell."""
    return shlex.quote(f"[{','.join(value)}]") if isinstance(value, tuple) else str(value)


def document(tuning: Tuning, reason: str, chosen: str | None) -> dict[str, Any]:
    """What --json prints."""
    return {
        "job": tuning.job.name,
        "device": tuning.device.name,
        "version": tuning.store.version,
        "stopped": reason,
        "residuals": {name: float(getattr(tuning.calibration.software, name)) for name in RESIDUALS},
        "candidates": [
            {
                "layout": each.plan.layout.as_dict(),
                "micro_batch": each.plan.micro_batch,
                "profile_seconds": each.profile_seconds,
                "step_seconds": each.seconds,
                "step_seconds_interval": list(each.interval),
                "p_out_of_memory": each.p_out_of_memory,
                "measured": each.row.model_dump(mode="json", exclude={"workload"}) if each.row else None,
            }
            for each in tuning.candidates
        ],
        "best": tuning.best and tuning.best.plan.as_dict(),
        "command": chosen,
    }
