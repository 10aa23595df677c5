"""A run's checkpoint as the beginning of another run, by the other engine.

Within an engine any layout reads what any wrote: `fivefold resume RUN layout.tp=2` is all that takes.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from jobs import compose
from jobs.errors import InputError, closest
from jobs.spec import DEGREES, SIMPLEST
from orchestrator.control import session
from orchestrator.control.export import whole_checkpoint
from orchestrator.messages import Event
from orchestrator.run_folder import RunFolder
from parallel.planning import planner

ENGINES = ("megatron", "deepspeed")


def reshard(run: RunFolder, root: str, engine: str, step: int | None) -> dict[str, Any]:
    """A new run under `root`, interrupted at `step`, by default the newest whole checkpoint's, to be resumed.

    InputError for an engine that is not known or is the run's own, a checkpoint that is missing or damaged, and a job
    that the engine cannot run. RuntimeError where the writer fails, which says why on stderr; nothing is left then.
    """
    job = compose.load(run.read("job.json"), run.path("job.json"))
    if engine not in ENGINES:
        raise InputError("--engine", engine, f"is not one of {', '.join(ENGINES)}", closest(engine, ENGINES))
    if engine == job.engine:
        rule = f"is the run's own, which reads its checkpoints at any layout: fivefold resume {run.run_id} layout.tp=2"
        raise InputError("--engine", engine, rule, next(other for other in ENGINES if other != engine))
    wanted = whole_checkpoint(run, step)
    free = job.layout.model_copy(update=dict.fromkeys((*DEGREES, "micro_batch", *SIMPLEST, "context_attention")))
    planning = planner.plan_job(job.model_copy(update={"engine": engine, "layout": free}))
    job = planner.resolve(job.model_copy(update={"engine": engine, "layout": free}), planning.plans[0])
    new = session.create(job, planning, root, "here")
    command = [sys.executable, "-m", "orchestrator.worker.reshard", run.place, str(wanted.step), new.place]
    if code := subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
        new.remove("")
        raise RuntimeError(f"nothing was resharded: the writer ended with exit code {code}")
    reason = f"begins with step {wanted.step} of {run.run_id}, which the {wanted.engine} engine trained"
    event = Event(kind="resharded", message=reason, data={"run": run.place, "step": wanted.step})
    new.append("events.jsonl", [event.model_dump(exclude={"type"})])
    new.write_json(
        "status.json", new.read_json("status.json") | {"state": "interrupted", "reason": reason, "step": wanted.step}
    )
    new.flush()
    return {"run_id": new.run_id, "run_folder": new.place, "from": run.run_id, "step": wanted.step, "engine": engine}
