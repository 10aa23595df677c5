"""`fivefold`: its command line, and how an answer or a refusal is given."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jobs.errors import CombinedInputError, InputError, closest
from orchestrator import verbs
from orchestrator.verbs import BAD_INPUT, DONE, INTERRUPTED, Answer


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
    parser, known = _parser()
    given = next((argument for argument in arguments if not argument.startswith("-")), None)
    if given is not None and given not in known:
        raise InputError("verb", given, f"is not one of {', '.join(known)}", closest(given, known))
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
    parser = _Parser(prog="fivefold", description="Plans, runs and resumes the training of language models.")
    choices = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: Any, text: str, *positional: str, group: Any = choices) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = group.add_parser(name, parents=[common], help=text, description=text)
        for argument in positional:
            if argument == "overrides":
                text = "layout.tp=2 cluster=h200_x8 ..."
                added.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=text)
            else:
                added.add_argument(argument, metavar=argument.upper())
        added.set_defaults(verb=function)
        return added

    plan = verb("plan", verbs.plan, "rank the layouts of a job; needs no GPU, no Ray, no torch", "job", "overrides")
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
        "tune", verbs.tune, "run layouts for a few steps, learn, and choose; here or at RAY_ADDRESS", "job", "overrides"
    )
    tuned.add_argument("--trials", type=_count, default=6, metavar="N", help="layouts run at most (default: 6)")
    tuned.add_argument("--steps", type=_count, default=6, metavar="N", help="of each (default: 6)")
    tuned.add_argument("--budget", type=_count, default=1800, metavar="SECONDS", help="for all (default: 1800)")
    chaos = verb(
        "chaos", verbs.chaos, "train here with injected faults, and judge what follows each", "job", "overrides"
    )
    chaos.add_argument("--seed", type=int, default=0, metavar="N", help="of the schedule (default: 0)")
    chaos.add_argument("--kinds", metavar="A,B", help="of faults, by name (default: all)")
    chaos.add_argument("--faults", type=_count, metavar="N", help="to inject (default: one of each kind)")
    verb("exact", verbs.exact, "hold the job's layout, on a small model here, against one device", "job", "overrides")
    verb("run", verbs.run, "train here, in the foreground", "job", "overrides")
    verb("submit", verbs.submit, "train on the Ray cluster at RAY_ADDRESS; prints the run id", "job", "overrides")
    verb(
        "resume",
        verbs.resume,
        "go on from the newest good checkpoint, at any layout",
        "run",
        "overrides",
    )
    verb("list", verbs.list_runs, "runs under the run root")
    verb("status", verbs.status, "where a run stands, and each of its ranks", "run")
    logs = verb("logs", verbs.logs, "what a rank printed, or the run's steps and events", "run")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    logs.add_argument("--rank", type=int, metavar="N", help="a rank's own output, of its newest attempt")
    verb("events", verbs.events, "what happened to a run", "run")
    verb("cancel", verbs.cancel, "checkpoint a run and end it", "run")
    verb("schema", verbs.schema, "JSON schema of a job spec")
    profile = verb("profile", verbs.profile, "measure this machine, and write the profile that plans are made with")
    profile.add_argument("--out", default="profile.json", metavar="FILE.json", help="(default: ./profile.json)")
    profile.add_argument("--seconds", type=_count, default=60, metavar="N", help="to measure for (default: 60)")
    benches = choices.add_parser("bench", help="this machine at work, and other software beside").add_subparsers(
        metavar="WHAT", required=True
    )
    for what, text in (
        ("kernels", "expert MLPs and what is around them, by this project's kernels and by others"),
        ("layer", "two layers of known models, forward and backward, by this project and by others"),
        ("offload", "a long sequence: activations kept, swapped and recomputed by token, or recomputed whole"),
        ("longest", "the longest sequence that trains with activations recomputed, and with them swapped"),
        ("sharing", "steps of a mixture on two devices that share experts, and on two that do not, by routing"),
    ):
        bench = verb(what, verbs.bench, text, group=benches)
        bench.set_defaults(what=what)
        bench.add_argument("--out", metavar="FILE.json", help="every figure, and FILE.png")
    bench = verb(
        "train", verbs.bench_train, "whole steps of a job at its best layout", "job", "overrides", group=benches
    )
    bench.add_argument("--steps", type=_count, default=10, metavar="N", help="timed (default: 10)")
    bench.add_argument("--out", metavar="FILE.json", help="every figure, and FILE.png")
    verb("doctor", verbs.doctor, "whether this environment can train, and what it lacks")
    checkpoint = choices.add_parser("checkpoint", help="a run's checkpoints").add_subparsers(
        metavar="VERB", required=True
    )
    verb("ls", verbs.checkpoint_ls, "list them", "run", group=checkpoint)
    verb("verify", verbs.checkpoint_verify, "read every byte and compare it with the manifest", "run", group=checkpoint)
    export = verb("export", verbs.checkpoint_export, "write one for other software", "run", group=checkpoint)
    export.add_argument("--format", default="huggingface", help="huggingface (default): safetensors and config.json")
    export.add_argument("--step", type=_count, metavar="N", help="the checkpoint (default: the newest that is whole)")
    export.add_argument("--to", metavar="FOLDER", help="a new or empty folder (default: ./RUN-step-N)")
    reshard = verb(
        "reshard", verbs.checkpoint_reshard, "a run that goes on by the other engine", "run", group=checkpoint
    )
    reshard.add_argument("--engine", required=True, metavar="ENGINE", help="megatron or deepspeed")
    reshard.add_argument("--step", type=_count, metavar="N", help="the checkpoint (default: the newest that is whole)")
    verb("control", verbs.control, "control a submitted run; called by its Ray job", "run")
    return parser, list(choices.choices)


if __name__ == "__main__":
    main()
