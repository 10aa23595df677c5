"""What it costs to be watched, how soon a rank a fifth slower is named, and whether a healthy run is let alone."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import PROJECT, lines, machine

from jobs.compose import compose
from jobs.spec import JobSpec
from orchestrator.messages import StepReport
from orchestrator.pulse import Pulse, new_page
from orchestrator.worker.collectives_seen import CollectivesSeen
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.main import import_engine
from orchestrator.worker.ranks import Ranks
from parallel.layout import Layout

TINY = str(PROJECT / "tests/e2e/tiny.yaml")
SLOW_FROM, SLOW_FOR = 100, 60
PHASES = ("data", "compute", "evaluate", "agree", "checkpoint")
CALLS = 20_000


def run(folder: str, *overrides: str) -> Path:
    command = [sys.executable, "-m", "orchestrator.cli", "run", TINY, "--run-root", folder, *overrides]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "RAY_TMPDIR": folder}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return max(Path(folder).glob("*/job.json"), key=os.path.getmtime).parent


def _collectives(rank: int, job: JobSpec) -> tuple[int, float]:
    """Begun in a step, and how long one takes."""
    layout = Layout.of(job.layout)
    pulse = Pulse(new_page())
    CollectivesSeen(pulse, layout, rank).install()
    engine = import_engine(job.engine, "cpu").build(job, layout, torch.device("cpu"))
    assert job.layout.micro_batch is not None
    counts, seconds = [], []
    for step in range(1, 8):
        batches = micro_batches(
            global_batch(job, step), layout.coordinates(rank)["dp"], layout.dp, job.layout.micro_batch
        )
        before, began = pulse._collectives, time.perf_counter()
        engine.train_step(step, 1e-3, batches)
        counts.append(pulse._collectives - before)
        seconds.append(time.perf_counter() - began)
    return counts[-1], median(seconds[2:])


def cost() -> dict[str, Any]:
    """Of a step of the quickstart: every call that watching adds, timed alone, over the step."""
    job = compose("quickstart", ["layout.tp=2", "layout.dp=2", "layout.ep=2", "layout.micro_batch=2"])
    found = Ranks().run(4, _collectives, job)
    count, step = found[0]
    pulse = Pulse(new_page())
    began = time.perf_counter()
    for _ in range(CALLS):
        pulse.collective("all_reduce dp cp")
        time.perf_counter(), time.perf_counter(), time.perf_counter(), time.perf_counter()
        pulse.collective_ended()
    collective = (time.perf_counter() - began) / CALLS
    began = time.perf_counter()
    for _ in range(CALLS):
        pulse.enter("compute", 1)
    phase = (time.perf_counter() - began) / CALLS
    began = time.perf_counter()
    for _ in range(CALLS // 10):
        _report().model_dump_json()
    report = (time.perf_counter() - began) / (CALLS // 10)
    seconds = count * collective + len(PHASES) * phase + report
    print(
        f"{count} collectives a step of {step * 1e3:.0f} ms: {seconds * 1e6:.0f} us of it, {seconds / step:.2%}",
        flush=True,
    )
    parts = {"collective_seconds": collective, "phase_seconds": phase, "report_seconds": report}
    return {"collectives": count, "step_seconds": step, **parts, "watching_seconds": seconds, "share": seconds / step}


def _report() -> StepReport:
    phases = dict.fromkeys(PHASES, 0.1)
    waited = {"tp": 0.1, "dp cp": 0.1, "ep": 0.1}
    figures = {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 1024, "step_seconds": 0.2}
    return StepReport(
        attempt=1, rank=0, step=1, **figures, phase_seconds=phases, waited_seconds=waited, memory_bytes=1 << 30
    )


def slow(folder: str, rank: int, factor: float) -> dict[str, Any]:
    """Steps from the first slow one to the event that names the rank and its cause."""
    fault = f"{{kind: slow_compute, rank: {rank}, step: {SLOW_FROM}, factor: {factor}, steps: {SLOW_FOR}}}"
    made = run(folder, f"train.steps={SLOW_FROM + SLOW_FOR}", "checkpoint.interval=0", f"chaos=[{fault}]")
    told = [event for event in lines(made / "events.jsonl") if event["kind"] == "rank_slow"]
    steps = lines(made / "metrics.jsonl")
    named = [
        {
            "rank": event["rank"],
            "cause": event["data"]["cause"],
            "slower": event["data"]["slower"],
            "after_steps": max(line["step"] for line in steps if line["at"] <= event["at"]) - SLOW_FROM + 1,
        }
        for event in told
    ]
    print(
        f"rank {rank} x{factor}: "
        + (
            ", ".join(f"{each['cause']} of rank {each['rank']} after {each['after_steps']} steps" for each in named)
            or "not named"
        ),
        flush=True,
    )
    return {"rank": rank, "factor": factor, "named": named}


def healthy(folder: str, steps: int) -> dict[str, Any]:
    """Slow evaluations, and saves that stall, in a run with nothing amiss."""
    stalls = ", ".join(
        f"{{kind: storage_stall, rank: {at % 4}, step: {steps * at // 8}, seconds: 4.0}}" for at in range(1, 8)
    )
    began = time.monotonic()
    made = run(
        folder,
        f"train.steps={steps}",
        f"checkpoint.interval={steps // 20}",
        f"train.eval_interval={steps // 10}",
        "train.eval_batches=100",
        f"chaos=[{stalls}]",
    )
    events = lines(made / "events.jsonl")
    counted = {
        kind: sum(event["kind"] == kind for event in events) for kind in ("rank_hung", "rank_slow", "attempt_failed")
    }
    metrics = lines(made / "metrics.jsonl")
    longest = max(line["phase_seconds"]["evaluate"] for line in metrics)
    saves = max(event["data"]["seconds"] for event in events if event["kind"] == "checkpoint_written")
    took = f"{len(metrics)} steps in {time.monotonic() - began:.0f} s"
    print(f"{took}, evaluations up to {longest:.1f} s, saves up to {saves:.1f} s: {counted}")
    return {
        "steps": len(metrics),
        "longest_evaluation_seconds": longest,
        "longest_save_seconds": saves,
        "told": counted,
        "slow": [event["message"] for event in events if event["kind"] == "rank_slow"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, help="of the healthy run")
    parser.add_argument("--json", metavar="FILE", help="where the figures are kept")
    options = parser.parse_args()
    document: dict[str, Any] = {"machine": machine(), "cost": cost()}
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="5f-") as folder:
        document["slow"] = [slow(folder, rank, 1.2) for rank in range(4)]
        document["healthy"] = healthy(folder, options.steps)
    if options.json:
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
