"""`fivefold plan`: everything that it can tell of a job's layouts, printed and as a document."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs import compose
from jobs.errors import InputError, closest
from jobs.spec import JobSpec
from orchestrator.control import calibrated, picture, plan_tables, session
from orchestrator.control.measured import Store
from parallel.estimates.hardware import Hardware
from parallel.estimates.swapping import notices as swapping_notices
from parallel.estimates.workload import Workload
from parallel.fssdp_means import unshared
from parallel.layout import Layout
from parallel.planning import planner
from parallel.planning.budget import Budget
from parallel.planning.deepspeed_config import deepspeed_config, outside_the_config
from parallel.planning.explanation import explain
from parallel.planning.megatron_flags import megatron_flags
from parallel.planning.options import without_a_name
from parallel.planning.shapes import sweep
from parallel.planning.what_if import changed


@dataclass(frozen=True)
class Questions:
    """What is asked beside the ranking. Names as on the command line."""

    top: int = 10
    quiet: bool = False
    """Print nothing: the document is all that is wanted."""
    format: str | None = None
    explain: bool = False
    what_if: Sequence[str] = ()
    tokens: str | None = None
    price: str | None = None
    sweep: Sequence[str] = ()
    picture: str | None = None


def answer(name: str, overrides: Sequence[str], asked: Questions, root: str) -> dict[str, Any]:
    """Plan a job and tell it, by what was measured under the run root where the job's own hardware is asked about.

    InputError for whatever is asked wrongly, before anything is printed or written.
    """
    job = compose.compose(name, overrides)
    budget = Budget.of(asked.tokens, asked.price)
    _check(job, asked)
    own = planner.device_of(job)
    device = changed(own, asked.what_if)
    document: dict[str, Any] = {"job": job.name, "cluster": job.cluster.model_dump(), **own.told()}
    announce(own)
    if asked.sweep:
        shapes = sweep(job, asked.sweep, device)
        if not asked.quiet:
            plan_tables.shapes(job, shapes, asked.top, budget)
        return document | {"shapes": [shape.as_dict() for shape in shapes]}
    store = None if asked.what_if else Store(root, job)
    planning = planner.plan_job(job, device) if store is None else calibrated.plan(job, store)
    session.with_weights(job, here=False)
    best = planning.plans[0]
    chosen = planner.resolve(job, best)
    announce_unshared(chosen)
    announce_swapping(chosen, job.layout.offload_activations, device)
    document["measured"] = len(store.rows) if store else 0
    document |= _ranked(job, planning, asked.top, budget)
    if asked.format is not None:
        return document | {asked.format: _FORMATS[asked.format](chosen, quiet=asked.quiet)}
    if not asked.quiet:
        plan_tables.planning(job, planning, asked.top, budget, document["measured"])
    if asked.what_if:
        document["what_if"] = _what_if(job, best, own, device, asked)
    if asked.explain:
        explanation = explain(job, best, device, calibrated.residuals(job, store) if store else None)
        document["explanation"] = explanation.as_dict()
        if not asked.quiet:
            plan_tables.explanation(best, explanation)
    if asked.picture is not None:
        Path(asked.picture).write_text(picture.page(job, best, device), encoding="utf-8")
        document["picture"] = asked.picture
        if not asked.quiet:
            print(f"\npicture  {asked.picture}")
    return document


def announce(device: Hardware) -> None:
    """Say loudly, where it is so, that the profile is another device's."""
    if device.notice:
        print(f"fivefold: {device.notice}", file=sys.stderr)


def announce_unshared(job: JobSpec) -> None:
    """Say where a job with every degree given asks for shared experts and will have none."""
    reason = unshared(job)
    if reason:
        print(f"fivefold: {reason}", file=sys.stderr)


def announce_swapping(job: JobSpec, share: float | str | None, device: Hardware) -> None:
    """Say where swapped activations stall, or host memory does not hold them.

    Of a job with every degree given; share: as it was asked for, which may be auto.
    """
    if share is not None:
        asked = job.model_copy(update={"layout": job.layout.model_copy(update={"offload_activations": share})})
        for text in swapping_notices(Workload.of(asked, Layout.of(job.layout), job.layout.micro_batch or 1), device):
            print(f"fivefold: {text}", file=sys.stderr)


def _check(job: JobSpec, asked: Questions) -> None:
    """Whether what is asked has an answer."""
    if asked.format is not None:
        if asked.format not in _FORMATS:
            known = ", ".join(_FORMATS)
            raise InputError("--format", asked.format, f"is not one of {known}", closest(asked.format, _FORMATS))
        if asked.format != job.engine:
            rule = f"--format {asked.format} writes what the {asked.format} engine is planned to run"
            raise InputError("engine", job.engine, rule, asked.format)
    if asked.picture is not None:
        path = Path(asked.picture)
        if path.suffix != ".html":
            raise InputError("--picture", asked.picture, "is drawn as a page and ends in .html", path.stem + ".html")
        if not path.parent.is_dir():
            raise InputError("--picture", asked.picture, f"{path.parent} is no folder")


def _ranked(job: JobSpec, planning: planner.Planning, top: int, budget: Budget | None) -> dict[str, Any]:
    devices = job.cluster.devices
    return {
        "considered": planning.considered,
        "candidates": planning.candidates,
        "evaluations": planning.evaluations,
        "plans": [plan.as_dict() | (budget.as_dict(plan, devices) if budget else {}) for plan in planning.plans[:top]],
        "rejections": [asdict(rejection) for rejection in planning.rejections],
    }


def _what_if(job: JobSpec, best: planner.Plan, own: Hardware, device: Hardware, asked: Questions) -> dict[str, Any]:
    """The best plan on the cluster's own profile, which may hold none, beside the one found."""
    before: planner.Plan | None = None
    why: str | None = None
    try:
        before = planner.plan_job(job, own).plans[0]
    except InputError as error:
        why = error.rule
    if not asked.quiet:
        plan_tables.what_if(best, before, own, device)
    return {"assumed": list(asked.what_if), "without": before and before.as_dict(), "without_reason": why}


def _megatron(job: JobSpec, *, quiet: bool) -> list[str]:
    flags = megatron_flags(job)
    if not quiet:
        print("\n".join(flags))
        for text in without_a_name(job.layout):
            print(f"not among the flags: {text}", file=sys.stderr)
    return flags


def _deepspeed(job: JobSpec, *, quiet: bool) -> dict[str, Any]:
    config = deepspeed_config(job)
    if not quiet:
        print(json.dumps(config, indent=2))
        for text in outside_the_config(job):
            print(f"not in the file: {text}", file=sys.stderr)
    return config


_FORMATS: dict[str, Callable[..., Any]] = {"megatron": _megatron, "deepspeed": _deepspeed}
