"""Plans by what was measured of a job's devices and software, where anything was."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from jobs.spec import JobSpec
from orchestrator.control.measured import Store
from parallel.estimates.costs import estimate_time
from parallel.estimates.memory import LIKELY_OUT
from parallel.estimates.software import Software
from parallel.estimates.workload import Workload
from parallel.layout import Layout
from parallel.planning import planner

if TYPE_CHECKING:
    from parallel.evidence.calibration import Calibration

MOST = 256
"""Plans, the fastest by the shipped residuals, that are ranked anew."""


def plan(job: JobSpec, store: Store) -> planner.Planning:
    """As planner.plan_job, and with a calibration's seconds, intervals and risk where the store has observations.

    A layout's micro-batch is the fastest by the shipped residuals. What is measured beyond what calibrated parts
    explain is a part of its own, so that parts sum to the step.
    """
    found = planner.plan_job(job)
    if not store.rows:
        return found
    from parallel.evidence.calibration import MemoryCalibration

    plans = found.plans[:MOST]
    steps = [planner.step_of(job, each) for each in plans]
    calibration = _calibration(job, store)
    memory, belief = MemoryCalibration(calibration.device, store.observations), calibration.believe(steps)
    ranked = []
    for at, (each, step) in enumerate(zip(plans, steps, strict=True)):
        parts, seconds = estimate_time(step, calibration.device, calibration.software), float(belief.seconds[at])
        faster = each.time.total / seconds
        ranked.append(
            replace(
                each,
                time=replace(parts, unexplained=seconds - parts.total),
                interval=belief.interval(at),
                p_out_of_memory=memory.of(step)[1],
                tokens_per_second=each.tokens_per_second * faster,
                mfu=each.mfu and each.mfu * faster,
            )
        )
    return replace(found, plans=(*sorted(ranked, key=_place), *found.plans[MOST:]))


def residuals(job: JobSpec, store: Store) -> Software | None:
    """What the job is priced with where its devices and software were measured."""
    return _calibration(job, store).software if store.rows else None


def _calibration(job: JobSpec, store: Store) -> Calibration:
    from parallel.evidence.calibration import Calibration  # NumPy is imported where it is wanted

    return Calibration(planner.device_of(job), Workload.of(job, Layout(), 1).software, store.observations)


def _place(plan: planner.Plan) -> tuple[bool, float]:
    """What is likely to run out of memory comes after what is not."""
    return plan.p_out_of_memory > LIKELY_OUT, plan.time.total
