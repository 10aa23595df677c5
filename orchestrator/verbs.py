"""What each verb of `fivefold` does: check the input, do one thing, and answer in text or in one document.

A heavy module is imported by the verbs that need it, so that the others answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import fields
from typing import Any

from jobs.errors import InputError
from orchestrator.run_folder import RunFolder, find_run, runs

DONE, INEXACT, BAD_INPUT, FAILED, INTERRUPTED = 0, 1, 2, 3, 130
Answer = tuple[Any, int]
"""The document that --json prints, and the exit code."""
_EXIT_CODE = {"done": DONE, "failed": FAILED, "cancelled": INTERRUPTED, "interrupted": INTERRUPTED}


def plan(options: argparse.Namespace) -> Answer:
    from orchestrator.control import planning

    asked = {field.name: getattr(options, field.name) for field in fields(planning.Questions) if field.name != "quiet"}
    questions = planning.Questions(**asked, quiet=options.json)
    return planning.answer(options.job, options.overrides, questions, options.run_root), DONE


def _resolved(options: argparse.Namespace, *, here: bool) -> tuple[Any, Any]:
    """The job as it is to be run, on this machine if `here`, and its planning."""
    from jobs import compose
    from orchestrator.control import calibrated, need, session
    from orchestrator.control.measured import Store
    from orchestrator.control.planning import announce, announce_swapping, announce_unshared
    from parallel.planning import planner

    job = compose.compose(options.job, options.overrides)
    announce(device := planner.device_of(job))
    planning = calibrated.plan(job, Store(options.run_root, job))
    share = job.layout.offload_activations
    job = planner.resolve(job, planning.plans[0])
    announce_unshared(job)
    announce_swapping(job, share, device)
    session.check_fault(job)
    need.engines()
    return session.with_weights(job, here=here), planning


def run(options: argparse.Namespace) -> Answer:
    from orchestrator.control import session

    job, planning = _resolved(options, here=True)
    _check_here(job)
    run = session.create(job, planning, options.run_root, "here")
    with session.taken(run):
        return _train(run, job, options)


def tune(options: argparse.Namespace) -> Answer:
    from jobs import compose
    from orchestrator.control import cluster, need, session, tune
    from orchestrator.control.measured import Store
    from orchestrator.control.planning import announce
    from orchestrator.control.trials import Trials
    from orchestrator.control.tune_display import TuneDisplay
    from parallel.planning import planner

    job = compose.compose(options.job, options.overrides)
    announce(planner.device_of(job))
    tuning = tune.Tuning(job, Store(options.run_root, job))
    need.engines()
    address = os.environ.get("RAY_ADDRESS")
    session.with_weights(job, here=not address)
    if address:
        client = cluster.check_cluster(address, job.cluster)
    else:
        client = None
        _check_here(job)
    limits = tune.Limits(options.trials, options.steps, options.budget)
    display = TuneDisplay(limits, sys.stderr if options.json else sys.stdout)
    reason = tune.tune(tuning, limits, Trials(options.run_root, display.of_trials, client), display)
    best = tuning.best
    verb = "submit" if address else "run"
    chosen = tune.command(verb, options.job, options.overrides, job, best.plan) if best else None
    display.summary(tuning, reason, chosen)
    return tune.document(tuning, reason, chosen), DONE if best else FAILED


def exact(options: argparse.Namespace) -> Answer:
    from jobs import compose
    from orchestrator.control import exact, need
    from parallel import shrink
    from parallel.planning import planner

    job = compose.compose(options.job, options.overrides)
    job = planner.resolve(job, planner.plan_job(job).plans[0])
    need.engines()
    verdict = exact.check(job, shrink.shrink(job), quiet=options.json)
    return verdict, DONE if verdict["exact"] else INEXACT


def chaos(options: argparse.Namespace) -> Answer:
    from orchestrator.control import chaos, chaos_schedule

    entries = chaos_schedule.chosen(options.kinds.split(",") if options.kinds else chaos_schedule.NAMES)
    job, planning = _resolved(options, here=True)
    _check_here(job)
    schedule = chaos_schedule.draw(job, entries, options.faults or len(entries), options.seed)
    card = chaos.run(job, planning, options.run_root, schedule, sys.stderr if options.json else sys.stdout)
    return card, DONE if card["all_right"] else INEXACT


def _check_here(job: Any) -> None:
    """Refuse, before anything is created, what cannot be trained on this machine."""
    from jobs import corpus
    from orchestrator.control import cluster
    from orchestrator.nvme import check_nvme

    cluster.check_embedded(job.cluster)
    check_nvme(job.layout)
    corpus.check(job.data, job.train)
    corpus.check_vocabulary(job.data, job.model.vocab)


def _train(run: RunFolder, job: Any, options: argparse.Namespace) -> Answer:
    from orchestrator.control import session
    from orchestrator.control.display import Display

    facts = session.run_here(run, job, Display(sys.stderr if options.json else sys.stdout))
    return facts, _EXIT_CODE[facts["state"]]


def submit(options: argparse.Namespace) -> Answer:
    from orchestrator.control import cluster, session

    job, planning = _resolved(options, here=False)
    client = cluster.check_cluster(os.environ.get("RAY_ADDRESS"), job.cluster)
    run = session.create(job, planning, options.run_root, "cluster")
    return _submitted(run, session.submit(run, job, client), options)


def _submitted(run: RunFolder, submission: str, options: argparse.Namespace) -> Answer:
    if not options.json:
        print(run.run_id)
        print(f"follow it with: fivefold logs {run.run_id} -f", file=sys.stderr)
    return {"run_id": run.run_id, "run_folder": run.place, "ray_job": submission}, DONE


def resume(options: argparse.Namespace) -> Answer:
    from orchestrator.control import session

    run = find_run(options.run_root, options.run)
    status = session.check_resumable(run)
    if status.get("where") == "cluster":  # Ray takes a submission once, and its job holds the run
        return _resume(run, options)
    with session.taken(run):
        return _resume(run, options)


def _resume(run: RunFolder, options: argparse.Namespace) -> Answer:
    from orchestrator import manifests
    from orchestrator.control import cluster, need, session
    from orchestrator.control.planning import announce_swapping
    from parallel.planning import planner

    status = session.check_resumable(run)
    job = session.resumed_job(run, options.overrides)
    share = "auto" if "layout.offload_activations=auto" in options.overrides else job.layout.offload_activations
    announce_swapping(job, share, planner.device_of(job))
    need.engines()
    if not manifests.steps(run):
        job = session.with_weights(job, here=status.get("where") == "here")
    if status.get("where") == "cluster":
        client = cluster.check_cluster(os.environ.get("RAY_ADDRESS"), job.cluster)
        session.resume(run, job, options.overrides)
        return _submitted(run, session.submit(run, job, client), options)
    _check_here(job)
    session.check_room(run, job)
    session.resume(run, job, options.overrides)
    return _train(run, job, options)


def control(options: argparse.Namespace) -> Answer:
    from orchestrator.control import session

    run = find_run(options.run_root, options.run)
    with session.taken(run):
        facts = session.run_as_job(run)
    return facts, _EXIT_CODE[facts["state"]]


def list_runs(options: argparse.Namespace) -> Answer:
    from orchestrator.control import tables
    from orchestrator.control.record import status_of

    statuses = [status_of(run) | {"run_folder": run.place} for run in runs(options.run_root)]
    if not options.json:
        tables.runs(statuses, options.run_root)
    return {"run_root": options.run_root, "runs": statuses}, DONE


def status(options: argparse.Namespace) -> Answer:
    from orchestrator.control import tables
    from orchestrator.control.record import status_of

    run = find_run(options.run_root, options.run)
    ledger = run.read_json("ledger.json") or {}
    status = status_of(run) | {
        "run_folder": run.place,
        "steps": run.read_json("job.json")["train"]["steps"],
        "ledger": ledger.get("totals", {}),
        "overall": ledger.get("overall", {}),
    }
    if not options.json:
        tables.status(status)
    return status, DONE


def logs(options: argparse.Namespace) -> Answer:
    from orchestrator.control import follow

    run = find_run(options.run_root, options.run)
    log = follow.log_file(run, options.rank)
    if options.json:
        return {"run_id": run.run_id, "log": log, "lines": follow.lines(run, log)}, DONE
    follow.print_log(run, options.rank, follow=options.follow)
    return None, DONE


def events(options: argparse.Namespace) -> Answer:
    run = find_run(options.run_root, options.run)
    events = list(run.read_lines("events.jsonl"))
    if not options.json:
        for event in events:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["at"]))
            print(f"{when}  attempt {event['attempt']}  {event['kind']:<18}  {event['message']}")
    return {"run_id": run.run_id, "events": events}, DONE


def cancel(options: argparse.Namespace) -> Answer:
    from orchestrator.control import controller, session
    from orchestrator.control.record import LIVE, status_of

    run = find_run(options.run_root, options.run)
    status = status_of(run)
    if status.get("state") not in LIVE:
        raise InputError("run", run.run_id, f"is not running: it is {status.get('state')}")
    controller.cancel(run)
    grace = run.read_json("job.json")["policy"]["grace_seconds"] + 30.0
    status = session.wait_until(run, ("cancelled", "done", "failed", "interrupted"), grace)
    if not options.json:
        print(f"{run.run_id} is {status['state']}: {status['reason']}")
    return status, DONE if status["state"] not in LIVE else FAILED


def schema(options: argparse.Namespace) -> Answer:
    from jobs.spec import JobSpec

    document = JobSpec.model_json_schema()
    if not options.json:
        print(json.dumps(document, indent=2))
    return document, DONE


def doctor(options: argparse.Namespace) -> Answer:
    from orchestrator.control import doctor

    findings = doctor.examine(options.run_root)
    if not options.json:
        doctor.show(findings)
    return {"findings": [finding.as_dict() for finding in findings]}, DONE if doctor.healthy(findings) else FAILED


def profile(options: argparse.Namespace) -> Answer:
    from orchestrator.control import need, profile

    need.modules("measuring", "torch")
    return profile.measure(options.out, options.seconds, quiet=options.json), DONE


def bench(options: argparse.Namespace) -> Answer:
    from orchestrator.control import bench, need

    need.engines()
    return bench.measure(options.what, options.out, quiet=options.json), DONE


def bench_train(options: argparse.Namespace) -> Answer:
    from orchestrator.control import bench

    job, planning = _resolved(options, here=True)
    _check_here(job)
    if job.engine != "megatron":
        raise InputError("engine", job.engine, "is benched by runs; this times the megatron engine's steps", "megatron")
    asked = (options.job, *options.overrides)
    return bench.train(job, planning.plans[0], options.steps, asked, options.out, quiet=options.json), DONE


def checkpoint_ls(options: argparse.Namespace) -> Answer:
    from orchestrator import manifests
    from orchestrator.control import tables

    run = find_run(options.run_root, options.run)
    found = manifests.found(run)
    if not options.json:
        tables.checkpoints(run, found)
    damaged = [{"step": step, "problem": str(each)} for step, each in found.items() if isinstance(each, InputError)]
    good = [each.model_dump(mode="json") for each in found.values() if not isinstance(each, InputError)]
    return {"run_id": run.run_id, "checkpoints": good, "damaged": damaged}, DONE


def checkpoint_verify(options: argparse.Namespace) -> Answer:
    from orchestrator import manifests

    run = find_run(options.run_root, options.run)
    verdicts = []
    for step in manifests.steps(run):
        manifest, problems = manifests.verified(run, step)
        files = len(manifest.files) if manifest else 0
        verdicts.append({"step": step, "files": files, "whole": not problems, "problems": problems})
        if not options.json:
            print(f"step {step}: " + ("; ".join(problems) or f"whole, {files} files"))
    if not verdicts and not options.json:
        print(f"{run.run_id} has no checkpoint")
    return {"run_id": run.run_id, "checkpoints": verdicts}, DONE if all(each["whole"] for each in verdicts) else FAILED


def checkpoint_reshard(options: argparse.Namespace) -> Answer:
    from orchestrator.control import need, reshard

    run = find_run(options.run_root, options.run)
    need.engines()
    try:
        made = reshard.reshard(run, options.run_root, options.engine, options.step)
    except RuntimeError as error:
        print(f"fivefold: {error}", file=sys.stderr)
        return {"error": str(error)}, FAILED
    if not options.json:
        print(f"{made['run_id']} begins with step {made['step']} of {made['from']}, for the {made['engine']} engine")
        print(f"go on with  fivefold resume {made['run_id']}")
    return made, DONE


def checkpoint_export(options: argparse.Namespace) -> Answer:
    from orchestrator.control import export, need, tables

    run = find_run(options.run_root, options.run)
    need.modules("an export", "torch", "safetensors")
    try:
        written = export.export(run, options.format, options.step, options.to)
    except RuntimeError as error:
        print(f"fivefold: {error}", file=sys.stderr)
        return {"error": str(error)}, FAILED
    if not options.json:
        tables.exported(written)
    return written, DONE
