"""The verbs of `fivefold`. Each checks its input, does one thing and answers in text or, with --json, one document."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from jobs.errors import CombinedInputError, InputError, closest
from orchestrator.run_folder import RunFolder, find_run, runs

DONE, INEXACT, BAD_INPUT, FAILED, INTERRUPTED = 0, 1, 2, 3, 130
Answer = tuple[Any, int]
"""The document that --json prints, and the exit code."""
_EXIT_CODE = {"done": DONE, "failed": FAILED, "cancelled": INTERRUPTED, "interrupted": INTERRUPTED}


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Parse and carry out one command line. Returns the exit code; bad input is one message, never a traceback."""
    try:
        code = _answer(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `fivefold logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    return code


def _answer(arguments: Sequence[str]) -> int:
    try:
        options = parse(arguments)
        answer: Answer = options.verb(options)
        document, code = answer
    except InputError as error:
        errors = error.errors if isinstance(error, CombinedInputError) else [error]
        print(f"fivefold: {error}", file=sys.stderr)
        document = {"error": str(error), "errors": [_error_record(each) for each in errors]}
        code = BAD_INPUT
    except KeyboardInterrupt:
        document, code = {"error": "interrupted"}, INTERRUPTED
    if "--json" in arguments:
        print(json.dumps(document, indent=2))
    return code


def _plan(options: argparse.Namespace) -> Answer:
    from orchestrator.control import planning

    asked = {field.name: getattr(options, field.name) for field in fields(planning.Questions) if field.name != "quiet"}
    questions = planning.Questions(**asked, quiet=options.json)
    return planning.answer(options.job, options.overrides, questions, options.run_root), DONE


def _resolved(options: argparse.Namespace, *, here: bool) -> tuple[Any, Any]:
    """The job as it is to be run, on this machine if `here`, and its planning."""
    from jobs import compose
    from orchestrator.control import calibrated, need, session
    from orchestrator.control.measured import Store
    from orchestrator.control.planning import announce
    from parallel.planning import planner

    job = compose.compose(options.job, options.overrides)
    announce(planner.device_of(job))
    planning = calibrated.plan(job, Store(options.run_root, job))
    job = planner.resolve(job, planning.plans[0])
    session.check_fault(job)
    need.engines()
    return session.with_weights(job, here=here), planning


def _run(options: argparse.Namespace) -> Answer:
    from orchestrator.control import session

    job, planning = _resolved(options, here=True)
    _check_here(job)
    return _train(session.create(job, planning, options.run_root, "here"), job, options)


def _tune(options: argparse.Namespace) -> Answer:
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
    chosen = tune.command(verb, options.job, options.overrides, best.plan) if best else None
    display.summary(tuning, reason, chosen)
    return tune.document(tuning, reason, chosen), DONE if best else FAILED


def _exact(options: argparse.Namespace) -> Answer:
    from jobs import compose
    from orchestrator.control import exact, need
    from parallel import shrink
    from parallel.planning import planner

    job = compose.compose(options.job, options.overrides)
    job = planner.resolve(job, planner.plan_job(job).plans[0])
    need.engines()
    verdict = exact.check(job, shrink.shrink(job), quiet=options.json)
    return verdict, DONE if verdict["exact"] else INEXACT


def _check_here(job: Any) -> None:
    """Refuse, before anything is created, what cannot be trained on this machine."""
    from jobs import corpus
    from orchestrator.control import cluster
    from orchestrator.offload import check_nvme

    cluster.check_embedded(job.cluster)
    check_nvme(job.layout)
    corpus.check(job.data, job.train)
    corpus.check_vocabulary(job.data, job.model.vocab)


def _train(run: RunFolder, job: Any, options: argparse.Namespace) -> Answer:
    from orchestrator.control import session
    from orchestrator.control.display import Display

    facts = session.run_here(run, job, Display(sys.stderr if options.json else sys.stdout))
    return facts, _EXIT_CODE[facts["state"]]


def _submit(options: argparse.Namespace) -> Answer:
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


def _resume(options: argparse.Namespace) -> Answer:
    from orchestrator import manifests
    from orchestrator.control import cluster, need, session

    run = find_run(options.run_root, options.run)
    status = session.check_resumable(run)
    job = session.resumed_job(run, options.overrides)
    need.engines()
    if not manifests.steps(run):
        job = session.with_weights(job, here=status.get("where") == "here")
    if status.get("where") == "cluster":
        client = cluster.check_cluster(os.environ.get("RAY_ADDRESS"), job.cluster)
        session.resume(run, job, options.overrides)
        return _submitted(run, session.submit(run, job, client), options)
    _check_here(job)
    session.resume(run, job, options.overrides)
    return _train(run, job, options)


def _control(options: argparse.Namespace) -> Answer:
    from orchestrator.control import session

    facts = session.run_as_job(find_run(options.run_root, options.run))
    return facts, _EXIT_CODE[facts["state"]]


def _list(options: argparse.Namespace) -> Answer:
    from orchestrator.control import tables
    from orchestrator.control.record import status_of

    statuses = [status_of(run) | {"run_folder": run.place} for run in runs(options.run_root)]
    if not options.json:
        tables.runs(statuses, options.run_root)
    return {"run_root": options.run_root, "runs": statuses}, DONE


def _status(options: argparse.Namespace) -> Answer:
    from orchestrator.control import tables
    from orchestrator.control.record import status_of

    run = find_run(options.run_root, options.run)
    status = status_of(run) | {
        "run_folder": run.place,
        "steps": run.read_json("job.json")["train"]["steps"],
        "ledger": (run.read_json("ledger.json") or {}).get("totals", {}),
    }
    if not options.json:
        tables.status(status)
    return status, DONE


def _logs(options: argparse.Namespace) -> Answer:
    from orchestrator.control import follow

    run = find_run(options.run_root, options.run)
    log = follow.log_file(run, options.rank)
    if options.json:
        return {"run_id": run.run_id, "log": log, "lines": follow.lines(run, log)}, DONE
    follow.print_log(run, options.rank, follow=options.follow)
    return None, DONE


def _events(options: argparse.Namespace) -> Answer:
    run = find_run(options.run_root, options.run)
    events = list(run.read_lines("events.jsonl"))
    if not options.json:
        for event in events:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["at"]))
            print(f"{when}  attempt {event['attempt']}  {event['kind']:<18}  {event['message']}")
    return {"run_id": run.run_id, "events": events}, DONE


def _cancel(options: argparse.Namespace) -> Answer:
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


def _schema(options: argparse.Namespace) -> Answer:
    from jobs.spec import JobSpec

    document = JobSpec.model_json_schema()
    if not options.json:
        print(json.dumps(document, indent=2))
    return document, DONE


def _doctor(options: argparse.Namespace) -> Answer:
    from orchestrator.control import doctor

    findings = doctor.examine(options.run_root)
    if not options.json:
        doctor.show(findings)
    return {"findings": [finding.as_dict() for finding in findings]}, DONE if doctor.healthy(findings) else FAILED


def _profile(options: argparse.Namespace) -> Answer:
    from orchestrator.control import need, profile

    need.modules("measuring", "torch")
    return profile.measure(options.out, options.seconds, quiet=options.json), DONE


def _checkpoint_ls(options: argparse.Namespace) -> Answer:
    from orchestrator import manifests
    from orchestrator.control import tables

    run = find_run(options.run_root, options.run)
    found = [manifests.read(run, step) for step in manifests.steps(run)]
    if not options.json:
        tables.checkpoints(run, found)
    return {"run_id": run.run_id, "checkpoints": [each.model_dump(mode="json") for each in found]}, DONE


def _checkpoint_verify(options: argparse.Namespace) -> Answer:
    from orchestrator import manifests

    run = find_run(options.run_root, options.run)
    verdicts = []
    for step in manifests.steps(run):
        manifest = manifests.read(run, step)
        problems = [text for entry in manifest.files if (text := manifests.damage(run, step, entry))]
        verdicts.append({"step": step, "files": len(manifest.files), "whole": not problems, "problems": problems})
        if not options.json:
            print(f"step {step}: " + ("; ".join(problems) or f"whole, {len(manifest.files)} files"))
    if not verdicts and not options.json:
        print(f"{run.run_id} has no checkpoint")
    return {"run_id": run.run_id, "checkpoints": verdicts}, DONE if all(each["whole"] for each in verdicts) else FAILED


def _checkpoint_export(options: argparse.Namespace) -> Answer:
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


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _error_record(error: InputError) -> dict[str, str | None]:
    value, nearest = error.value, error.nearest
    return {
        "path": error.path,
        "value": None if value is None else str(value),
        "rule": error.rule,
        "nearest": None if nearest is None else str(nearest),
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError("command line", None, f"{message}; `{self.prog} --help` tells more")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser, verbs = _parser()
    given = next((argument for argument in arguments if not argument.startswith("-")), None)
    if given is not None and given not in verbs:
        raise InputError("verb", given, f"is not one of {', '.join(verbs)}", closest(given, verbs))
    options, rest = parser.parse_known_args(arguments)
    stray = [argument for argument in rest if argument.startswith("-") or "overrides" not in options]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> tuple[_Parser, list[str]]:
    """The command line, and its verbs."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document, last on stdout")
    common.add_argument(
        "--run-root",
        default=os.environ.get("FIVEFOLD_RUN_ROOT", "runs"),
        metavar="PLACE",
        help="folder of run folders, a path or an fsspec URL (default: $FIVEFOLD_RUN_ROOT or ./runs)",
    )
    parser = _Parser(prog="fivefold", description=__doc__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: Any, text: str, *positional: str, group: Any = verbs) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = group.add_parser(name, parents=[common], help=text, description=text)
        for argument in positional:
            if argument == "overrides":
                text = "layout.tp=2 cluster=h200_x8 ..."
                added.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=text)
            else:
                added.add_argument(argument, metavar=argument.upper())
        added.set_defaults(verb=function)
        return added

    plan = verb("plan", _plan, "rank the layouts of a job; needs no GPU, no Ray, no torch", "job", "overrides")
    plan.add_argument("--top", type=_count, default=10, metavar="N", help="layouts shown (default: 10)")
    for name, metavar, text in (
        ("--format", "ENGINE", "the best plan alone: megatron, Megatron-LM's flags; deepspeed, a DeepSpeed config"),
        ("--tokens", "N", "days to train on them: 1T, 300B, 2e12"),
        ("--price", "P", "of a device for an hour: adds the cost to the days"),
        ("--picture", "FILE.html", "memory by pipeline stage and the timeline of a step, as a page"),
    ):
        plan.add_argument(name, metavar=metavar, help=text)
    for name, metavar, text in (
        ("--what-if", "hardware.FIELD=VALUE", "plan with other hardware: hardware.memory=141GB; may be repeated"),
        ("--sweep", "model.FIELD=V,V", "rank shapes as large as the job's model instead of layouts; may be repeated"),
    ):
        plan.add_argument(name, metavar=metavar, help=text, action="append", default=[])
    plan.add_argument("--explain", action="store_true", help="where the time goes, and what each change would do")
    tuned = verb(
        "tune", _tune, "run layouts for a few steps, learn, and choose; here or at RAY_ADDRESS", "job", "overrides"
    )
    tuned.add_argument("--trials", type=_count, default=6, metavar="N", help="layouts run at most (default: 6)")
    tuned.add_argument("--steps", type=_count, default=6, metavar="N", help="of each (default: 6)")
    tuned.add_argument("--budget", type=_count, default=1800, metavar="SECONDS", help="for all (default: 1800)")
    verb("exact", _exact, "hold the job's layout, on a small model here, against one device", "job", "overrides")
    verb("run", _run, "train here, in the foreground", "job", "overrides")
    verb("submit", _submit, "train on the Ray cluster at RAY_ADDRESS; prints the run id", "job", "overrides")
    verb("resume", _resume, "go on from the newest good checkpoint, at the same or another layout", "run", "overrides")
    verb("list", _list, "runs under the run root")
    verb("status", _status, "where a run stands, and each of its ranks", "run")
    logs = verb("logs", _logs, "what a rank printed, or the run's steps and events", "run")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    logs.add_argument("--rank", type=int, metavar="N", help="a rank's own output, of its newest attempt")
    verb("events", _events, "what happened to a run", "run")
    verb("cancel", _cancel, "checkpoint a run and end it", "run")
    verb("schema", _schema, "JSON schema of a job spec")
    profile = verb("profile", _profile, "measure this machine, and write the profile that plans are made with")
    profile.add_argument("--out", default="profile.json", metavar="FILE.json", help="(default: ./profile.json)")
    profile.add_argument("--seconds", type=_count, default=60, metavar="N", help="to measure for (default: 60)")
    verb("doctor", _doctor, "whether this environment can train, and what it lacks")
    checkpoint = verbs.add_parser("checkpoint", help="a run's checkpoints").add_subparsers(
        metavar="VERB", required=True
    )
    verb("ls", _checkpoint_ls, "list them", "run", group=checkpoint)
    verb("verify", _checkpoint_verify, "read every byte and compare it with the manifest", "run", group=checkpoint)
    export = verb("export", _checkpoint_export, "write one as a folder for other software", "run", group=checkpoint)
    export.add_argument("--format", default="huggingface", help="huggingface (default): safetensors and config.json")
    export.add_argument("--step", type=_count, metavar="N", help="the checkpoint (default: the newest that is whole)")
    export.add_argument("--to", metavar="FOLDER", help="a new or empty folder (default: ./RUN-step-N)")
    verb("control", _control, "control a submitted run; called by its Ray job", "run")
    return parser, list(verbs.choices)


if __name__ == "__main__":
    main()
