"""Runs made by hand: a job, its folder and its checkpoints, as a controller and ranks would leave them."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from functools import cache
from typing import Any

from jobs.compose import amend, compose
from jobs.spec import JobSpec
from orchestrator import manifests
from orchestrator.files import FileEntry
from orchestrator.manifests import CheckpointManifest
from orchestrator.messages import Event, RankLaunch, StepReport
from orchestrator.run_folder import RunFolder
from parallel.layout import Layout

LAYOUT = ("layout.tp=2", "layout.cp=1", "layout.dp=2", "layout.pp=1", "layout.vpp=1", "layout.ep=2", "layout.etp=1")


@cache
def _quickstart() -> JobSpec:
    return compose("quickstart", [*LAYOUT, "layout.micro_batch=4"])


def job(*overrides: str) -> JobSpec:
    """quickstart on four ranks, tp2 dp2 ep2, on a text that is quickly found."""
    return amend(_quickstart(), ["data.files=stdlib:json/*.py", *overrides])


def step_report(step: int, rank: int = 0, attempt: int = 1, **changes: Any) -> StepReport:
    figures: dict[str, Any] = {
        "loss": 5.0 - step / 10,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "tokens": 2048,
        "step_seconds": 0.5,
        "phase_seconds": {"data": 0.1, "compute": 0.4, "evaluate": 0.0},
        "memory_bytes": 300_000_000 + rank,
        "at": 1_000_000.0 + step,
    }
    return StepReport(step=step, rank=rank, attempt=attempt, **(figures | changes))


def metrics_line(step: int, attempt: int = 1, **changes: Any) -> dict[str, Any]:
    line = step_report(step, attempt=attempt).model_dump(
        exclude={"type", "rank", "validation_loss", "waited_seconds", "routed_rows", "expert_loads"}
    )
    return line | {"tokens_per_second": 4096.0} | changes


def event_line(kind: str, message: str, attempt: int = 1, at: float = 1_000_000.0, **data: Any) -> dict[str, Any]:
    return Event(kind=kind, message=message, attempt=attempt, at=at, data=data).model_dump(exclude={"type"})


def make_run(place: str, spec: JobSpec | None = None, **status: Any) -> RunFolder:
    """A run folder: of a finished run of this machine, unless `status` says otherwise."""
    run, spec = RunFolder(place), spec or job()
    run.write_json("plan.json", {})
    base = {
        "run_id": run.run_id,
        "state": "done",
        "reason": "trained 100 steps",
        "created_at": time.time(),
        "updated_at": time.time(),
        "attempt": 1,
        "step": 100,
        "where": "here",
        "layout": Layout(tp=2, dp=2, ep=2).as_dict(),
        "world": 4,
        "controller": {"host": socket.gethostname(), "pid": os.getpid()},
        "ranks": [],
    }
    run.write_json("status.json", base | status)
    run.write_json("job.json", spec.model_dump(mode="json"))
    return run


def make_checkpoint(run: RunFolder, step: int, spec: JobSpec | None = None, **changes: Any) -> CheckpointManifest:
    """A whole checkpoint of two files."""
    spec, folder = spec or job(), manifests.folder_name(step)
    contents = {"model/part-0.bin": bytes(range(256)) * 8, "common.pt": f"step {step}".encode()}
    for name, content in contents.items():
        run.write(f"{folder}/{name}", content)
    written: dict[str, Any] = {
        "run_id": run.run_id,
        "attempt": 1,
        "step": step,
        "engine": "megatron",
        "layout": spec.layout,
        "model": spec.model,
        "data_cursor": step * spec.train.global_batch,
        "random_state": {"seed": 1234, "step": step},
        "written_at": 1_000_000.0 + step,
        "reports": (step_report(step),),
        "files": tuple(
            FileEntry(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in contents.items()
        ),
    }
    return manifests.write(run, CheckpointManifest(**(written | changes)))


def change_json(run: RunFolder, name: str, **changes: Any) -> None:
    run.write(name, json.dumps(run.read_json(name) | changes).encode())


def rank_launch(run_id: str, rank: int, attempt: int) -> RankLaunch:
    """For a rank that does not train: its store is nowhere."""
    return RankLaunch(
        run_id=run_id,
        attempt=attempt,
        rank=rank,
        local_rank=rank,
        store_address="127.0.0.1",
        store_port=1,
        run_folder="",
        job=job(),
        checkpoint_steps=(),
    )
