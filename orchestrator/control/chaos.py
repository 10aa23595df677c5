"""`fivefold chaos`: a job is run with faults, beside the same job without, and each fault's outcome is judged."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
from collections.abc import Sequence
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from jobs.errors import InputError
from jobs.injections import Injection
from jobs.spec import JobSpec
from orchestrator.control import session
from orchestrator.control.chaos_expectations import Verdict, judge
from orchestrator.control.controller import injected
from orchestrator.control.display import Display
from orchestrator.control.record import status_of
from orchestrator.run_folder import RunFolder, is_url
from parallel.planning import planner

Record = dict[str, Any]
_AT_ANOTHER_LAYOUT = 1e-6
"""Relative deviation of a loss where a fault had the run go on at another layout, which adds in another order."""
_FUTILE = 2
"""Sessions in a row that end without a fault, after which a run is given up."""


def run(job: JobSpec, planning: planner.Planning, root: str, schedule: tuple[Injection, ...], out: IO[str]) -> Record:
    """The scorecard of `schedule`: its lines, totals, and whether all is right. Trains here, twice.

    InputError where the run root is an object store.
    """
    if is_url(root):
        raise InputError(
            "run root", root, "chaos damages files of its run, and wants them on a disk of this machine", "runs"
        )
    calm = session.create(job, planning, root, "here")
    budget = job.policy.model_copy(update={"max_restarts": 2 * len(schedule)})
    disturbed = job.model_copy(update={"chaos": schedule, "policy": budget})
    stormy = session.create(disturbed, planning, root, "here")
    _session([(calm, job), (stormy, disturbed)], out)
    _until_done(stormy, disturbed, out)
    card = scorecard(schedule, job.checkpoint.interval, calm, stormy)
    show(card, out)
    return card


def scorecard(schedule: Sequence[Injection], interval: int, calm: RunFolder, stormy: RunFolder) -> Record:
    """What the two runs' folders say of them."""
    events, lines = list(stormy.read_lines("events.jsonl")), list(stormy.read_lines("metrics.jsonl"))
    verdicts = [judge(place, fault, events, lines, interval) for place, fault in enumerate(schedule)]
    undisturbed, loss = _last_loss(calm), _last_loss(stormy)
    replanned = any(event["kind"] == "replanned" for event in events)
    return {
        "faults": [verdict.as_dict() for verdict in verdicts],
        "right": sum(verdict.right for verdict in verdicts),
        "count": len(verdicts),
        "steps_lost": sum(verdict.steps_lost for verdict in verdicts),
        "loss_undisturbed": undisturbed,
        "loss": loss,
        "same_loss": (same := _same(undisturbed, loss, _AT_ANOTHER_LAYOUT if replanned else 0.0)),
        "replanned": replanned,
        "state": status_of(stormy)["state"],
        "all_right": same and all(verdict.right for verdict in verdicts),
        "run_folder": stormy.place,
        "undisturbed_run_folder": calm.place,
    }


def show(card: Record, out: IO[str]) -> None:
    table = Table("fault", "found as", "after", "named", "decision", "steps lost", "", box=None)
    for line in card["faults"]:
        verdict = Verdict(**line)
        seconds = "" if verdict.seconds is None else f"{verdict.seconds:.2f} s"
        missed = "missed" if verdict.injected else "not injected"
        table.add_row(
            verdict.fault,
            verdict.found or missed,
            seconds,
            "yes" if verdict.named else "no",
            verdict.decision or "",
            str(verdict.steps_lost),
            "right" if verdict.right else "WRONG",
        )
    console = Console(file=out, highlight=False, width=140)
    console.print(table)
    console.print(f"{card['right']} of {card['count']} right, {card['steps_lost']} steps trained twice")
    near = "within 1e-6 of" if card["replanned"] else "bit-equal to"
    equal = near if card["same_loss"] else "NOT that of"
    console.print(f"final loss {card['loss']}: {equal} the undisturbed run's, {card['loss_undisturbed']}")


def _until_done(run: RunFolder, job: JobSpec, out: IO[str]) -> None:
    """Take the run up again for as long as it is faults that end its sessions; once more where it is the machine."""
    happened, futile = injected(run), 0
    while status_of(run)["state"] != "done" and futile < _FUTILE:
        session.resume(run, job, ())
        _session([(run, job)], out)
        futile = futile + 1 if injected(run) == happened else 0
        happened = injected(run)


def _session(runs: Sequence[tuple[RunFolder, JobSpec]], out: IO[str]) -> None:
    """One life of a controller, in a process of its own: it may be killed. Its runs share one start of Ray."""
    process = multiprocessing.get_context("fork").Process(target=_control, args=(runs, out))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:  # the controller has it too, and saves what it has
        process.join()
        raise


def _control(runs: Sequence[tuple[RunFolder, JobSpec]], out: IO[str]) -> None:
    for run, job in runs:
        with contextlib.suppress(Exception):  # it stands in the run folder
            session.run_here(run, job, Display(out))


def _same(one: float | None, other: float | None, tolerance: float) -> bool:
    return one is not None and other is not None and math.isclose(one, other, rel_tol=tolerance)


def _last_loss(run: RunFolder) -> float | None:
    """Of the last step of a run that is done."""
    lines = list(run.read_lines("metrics.jsonl"))
    return lines[-1]["loss"] if lines and status_of(run)["state"] == "done" else None
