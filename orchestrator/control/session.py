"""A session is one life of a run's controller: here in the foreground, or as a job of a Ray cluster."""

from __future__ import annotations

import contextlib
import fcntl
import io
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from jobs import compose
from jobs.errors import CombinedInputError, InputError
from jobs.spec import JobSpec
from models import huggingface_folder
from orchestrator import manifests
from orchestrator.control import cluster, replanning
from orchestrator.control.controller import Controller
from orchestrator.control.display import Display, bytes_text
from orchestrator.control.expert_plot import plot_expert_loads
from orchestrator.control.injector import Injector
from orchestrator.control.memory_picture import plot_told_memory
from orchestrator.control.plot import plot_ledger, plot_loss, plot_ranks
from orchestrator.control.record import LIVE, RunRecord, State, Throughput, new_status, status_of
from orchestrator.messages import Event, Stop
from orchestrator.run_folder import RunFolder, is_url, new_run_id
from parallel.estimates.hardware import hardware
from parallel.layout import Layout
from parallel.planning import planner

_DECIDED_AT_START = (
    "name",
    "engine",
    "model",
    "init_from",
    "data",
    "train.sequence_length",
    "train.global_batch",
    "train.seed",
)
"""Keys that a resumed run keeps: with another value its samples or weights would not be the same run's."""


def create(job: JobSpec, planning: planner.Planning, root: str, where: Literal["here", "cluster"]) -> RunFolder:
    """A new run folder, whole or not at all, with the job as it is to be run; InputError where it has no room."""
    run = RunFolder(f"{root.rstrip('/')}/{new_run_id(job.name)}")
    check_room(run, job)
    try:
        run.write_json("plan.json", planning.plans[0].as_dict() | planner.device_of(job).told())
        run.write_json("status.json", new_status(run.run_id, Layout.of(job.layout), where))
        run.write_json("job.json", job.model_dump(mode="json"))
    except Exception as error:  # a filesystem's library raises what it likes
        rule = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise InputError("run root", root, rule) from None
    return run


def check_room(run: RunFolder, job: JobSpec) -> None:
    """Refuse a disk on which not one checkpoint of the job has room: weights and two moments in fp32, at least."""
    if run.local is None or not job.checkpoint.interval:
        return
    existing = next(place for place in (run.local, *run.local.parents) if place.exists())
    disk, needed = shutil.disk_usage(existing), 12 * job.model.parameters
    if disk.total and disk.free < needed:  # what has no size is no disk, and is refused as such
        rule = f"has {bytes_text(disk.free)} free, and a checkpoint of this job takes {bytes_text(needed)} at least"
        raise InputError("run root", str(run.local.parent), rule, "free some room, or another --run-root")


def run_here(run: RunFolder, job: JobSpec, display: Display) -> dict[str, Any]:
    """Train on this machine with an embedded Ray; returns the run's summary."""
    return _control(run, job, "here", display)


def run_as_job(run: RunFolder) -> dict[str, Any]:
    """Control a run from within a job of a Ray cluster."""
    job = compose.load(run.read("job.json"), run.path("job.json"))
    return _control(run, job, "cluster", Display())


def submit(run: RunFolder, job: JobSpec, client: Any) -> str:
    """Hand a created run to a Ray cluster. Returns the Ray job's submission id."""
    # Ray takes an id once. A session may end before its first attempt, so it is resumptions that are counted.
    resumptions = sum(event["kind"] == "resumed" for event in run.read_lines("events.jsonl"))
    submission = f"{run.run_id}-{resumptions}" if resumptions else run.run_id
    # The cluster's own `fivefold` comes first; this machine's is found where it is one of the nodes.
    here = shlex.quote(str(Path(sys.executable).parent))
    client.submit_job(
        entrypoint=f'PATH="$PATH":{here} exec fivefold control {shlex.quote(run.place)}',
        submission_id=submission,
        metadata={"fivefold_run": run.run_id, "fivefold_job": job.name},
    )
    return submission


@contextlib.contextmanager
def taken(run: RunFolder) -> Iterator[None]:
    """Hold a run for as long as it is controlled from here; InputError where another process holds it.

    By a lock of its events file, which the kernel frees when its holder ends, however it ends. Of a run in an object
    store, status.json alone says who controls it.
    """
    if run.local is None:
        yield
        return
    with open(run.path("events.jsonl"), "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = "is controlled by another process at this moment"
            raise InputError("run", run.run_id, rule, f"fivefold status {run.run_id}") from None
        yield


def check_resumable(run: RunFolder) -> dict[str, Any]:
    """The status of a run whose controller is not alive; InputError where it is."""
    status = status_of(run)
    if status.get("state") in LIVE:
        controller = status.get("controller") or {"pid": "?", "host": "its cluster"}
        rule = f"is {status['state']}: its controller is pid {controller['pid']} on {controller['host']}"
        raise InputError("run", run.run_id, rule, f"fivefold cancel {run.run_id}")
    return status


def resumed_job(run: RunFolder, overrides: Sequence[str]) -> JobSpec:
    """The job of a run as it is to go on: single values changed, and planned anew where its layout is touched."""
    saved = compose.load(run.read("job.json"), run.path("job.json"))
    pairs = [(key, value) for key, _, value in (override.partition("=") for override in overrides)]
    keys = [key for key, _ in pairs]
    remedy = f"fivefold checkpoint reshard {run.run_id} --engine {dict(pairs).get('engine')}"
    refused = [
        InputError(key, value, "is decided when a run starts; start another run", remedy if key == "engine" else None)
        for key, value in pairs
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in _DECIDED_AT_START)
    ]
    if refused:
        raise CombinedInputError(refused)
    replanned = any(key.startswith(("layout", "cluster")) for key in keys)
    if replanned:
        saved = replanning.free(saved)
    job = compose.amend(saved, overrides)
    if replanned:
        job = planner.resolve(job, planner.plan_job(job).plans[0])
    else:
        planner.plan_job(job)  # the saved layout must still be one that runs
    if any(key.startswith("fault") for key in keys):  # one that has happened may stand at any layout
        check_fault(job)
    newest, steps = next(iter(manifests.steps(run)), 0), job.train.steps
    # One that is not done may have all its steps, trained by ranks that outlived their controller and still to be told.
    if newest >= steps and (steps != saved.train.steps or status_of(run)["state"] == "done"):
        rule = f"all {newest} steps of {run.run_id} are trained"
        raise InputError("train.steps", steps, rule, f"train.steps={2 * newest}")
    for manifest in manifests.whole(run)[:1]:  # older ones may go while ranks of a dead controller are still saving
        manifests.check_job(manifest, job, run.place)
    return job


def check_fault(job: JobSpec) -> None:
    """Refuse an injected fault that would never happen."""
    layout, steps = Layout.of(job.layout), job.train.steps
    paths = [(f"chaos.{place}.rank", f"chaos.{place}.step") for place in range(len(job.chaos))]
    for fault, (rank, step) in zip(job.injections, [*paths, ("fault.kill_rank", "fault.at_step")], strict=False):
        if fault.rank >= layout.world:
            rule = f"layout {layout.label} has ranks 0..{layout.world - 1}"
            raise InputError(rank, fault.rank, rule, layout.world - 1)
        if fault.step > steps:
            raise InputError(step, fault.step, f"exceeds train.steps={steps}", steps)


def with_weights(job: JobSpec, *, here: bool) -> JobSpec:
    """The job with an absolute `init_from`, once that folder is seen to hold its model; InputError where it does not.

    A folder that this machine does not have is left to the ranks, which check it before the first step, unless they
    are to run `here`.
    """
    if job.init_from is None:
        return job
    place = Path(job.init_from).expanduser().absolute()
    if not here and not is_url(job.init_from) and not place.exists():
        print(f"init_from={job.init_from}: is not on this machine; the ranks will check it", file=sys.stderr)
        return job
    huggingface_folder.check(job.init_from, job.model)
    return job.model_copy(update={"init_from": str(place)})


def resume(run: RunFolder, job: JobSpec, overrides: Sequence[str]) -> None:
    """Write down how a run goes on, before it does."""
    run.write_json("job.json", job.model_dump(mode="json"))
    run.remove("requests")
    changed = f" with {' '.join(overrides)}" if overrides else ""
    event = Event(kind="resumed", message=f"resumed{changed}", data={"overrides": list(overrides)})
    run.append("events.jsonl", [event.model_dump(exclude={"type"})])
    run.flush()


def _control(run: RunFolder, job: JobSpec, where: Literal["here", "cluster"], display: Display) -> dict[str, Any]:
    layout = Layout.of(job.layout)
    record = RunRecord(run, layout, where, throughput(job))
    record.listen(display)
    if job.chaos:
        record.listen(Injector(record, job.chaos))
    controller = Controller(job, record, cluster.Cluster(run, job, where))

    def interrupt(number: int, frame: FrameType | None) -> None:
        controller.interrupt()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    display.opening(run.place, job, describe_layout(job))
    try:
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # where Ray says what its daemon does, amid a document for programs
            outcome = controller.run()
    finally:
        display.close()
    facts = summary(run, outcome)
    display.summary(facts)
    return facts


def describe_layout(job: JobSpec) -> str:
    """`tp2 dp2 ep2 on 4 cpu ranks, 2 x 4 sequences a rank and step`."""
    layout, micro_batch = Layout.of(job.layout), job.layout.micro_batch or 1
    count = job.train.global_batch // (layout.dp * micro_batch)
    return f"{layout.label} on {layout.world} {job.cluster.device} ranks, each {count} x {micro_batch} sequences a step"


def throughput(job: JobSpec) -> Throughput:
    """Tokens a second and, where the device's peak is known, model FLOPs utilisation of all ranks."""
    device = hardware(job.cluster.hardware, job.cluster.devices_per_node)
    peak = device.peak_flops(job.train.precision)
    flops_per_token = job.model.flops_per_token(job.train.sequence_length)

    def figures(tokens_per_second: float, world: int) -> dict[str, float]:
        figures = {"tokens_per_second": tokens_per_second}
        if peak is not None:
            figures["mfu"] = flops_per_token * tokens_per_second / (peak * world)
        return figures

    return figures


def summary(run: RunFolder, outcome: Stop) -> dict[str, Any]:
    """What a run came to; draws its loss plot. Read from the folder, so it tells of all attempts and sessions."""
    lines = list(run.read_lines("metrics.jsonl"))
    events = list(run.read_lines("events.jsonl"))
    entropy = next((event["data"]["unigram_entropy"] for event in events if event["kind"] == "training_started"), None)
    restarts = [event["data"]["step"] for event in events if event["kind"] == "attempt_failed"]
    if lines:
        picture = io.BytesIO()
        plot_loss(lines, picture, entropy, restarts)
        run.write("loss.png", picture.getvalue())
    ledger = run.read_json("ledger.json") or {}
    samples = list(run.read_lines("ledger.jsonl"))
    if len(samples) > 1:
        picture = io.BytesIO()
        plot_ledger(samples, picture)
        run.write("ledger.png", picture.getvalue())
    ranks = list(run.read_lines("ranks.jsonl"))
    if ranks:
        picture = io.BytesIO()
        plot_ranks(ranks, picture)
        run.write("ranks.png", picture.getvalue())
    loads = list(run.read_lines("expert_loads.jsonl"))
    if loads:
        picture = io.BytesIO()
        plot_expert_loads(loads, picture)
        run.write("expert_loads.png", picture.getvalue())
    told = run.read_json("memory.json")
    if told and told["requests"]:
        picture = io.BytesIO()
        plot_told_memory(told, picture)
        run.write("memory.png", picture.getvalue())
    return {
        "run_id": run.run_id,
        "run_folder": run.place,
        "state": outcome.state,
        "reason": outcome.reason,
        "attempts": max((line["attempt"] for line in lines), default=0),
        "step": lines[-1]["step"] if lines else 0,
        "loss_first": lines[0]["loss"] if lines else None,
        "loss_last": lines[-1]["loss"] if lines else None,
        "validation_loss": next(
            (line["validation_loss"] for line in reversed(lines) if "validation_loss" in line), None
        ),
        "unigram_entropy": entropy,
        "ledger": ledger.get("totals", {}),
        "overall": ledger.get("overall", {}),
        "loss_plot": f"{run.place}/loss.png" if lines else None,
    }


def wait_until(run: RunFolder, ended: Sequence[State], patience_seconds: float) -> dict[str, Any]:
    """The status of a run once it is in one of these states, or when patience ends."""
    deadline = time.monotonic() + patience_seconds
    while (status := status_of(run)).get("state") not in ended and time.monotonic() < deadline:
        time.sleep(0.1)
    return status
