"""Cancelling and resuming: what is done to a run that exists, and that a refusal leaves it untouched."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from commands import Fivefold, contents, refused
from sample_runs import change_json, job, make_checkpoint

from jobs.compose import compose
from orchestrator.control import controller, session
from orchestrator.control.controller import CANCEL_REQUEST
from orchestrator.run_folder import RunFolder
from parallel.planning.planner import plan_job

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("state", ["done", "failed", "cancelled", "interrupted"])
def test_a_run_that_has_ended_cannot_be_cancelled(fivefold: Fivefold, run: RunFolder, state: str) -> None:
    change_json(run, "status.json", state=state)
    assert f"is not running: it is {state}" in refused(fivefold("cancel", "quick-1"), "run")
    assert not run.exists(CANCEL_REQUEST)


def test_cancelling_waits_until_the_run_has_ended(
    fivefold: Fivefold, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_json(run, "status.json", state="running")

    def controllers(asked: RunFolder) -> None:
        change_json(asked, "status.json", state="cancelled", reason="cancelled at step 40")

    monkeypatch.setattr(controller, "cancel", controllers)
    answer = fivefold("cancel", "quick-1")
    assert (answer.code, answer.out) == (0, "quick-1 is cancelled: cancelled at step 40\n")


def test_a_run_that_nobody_controls_yet_can_be_asked(
    fivefold: Fivefold, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job()
    run = session.create(spec, plan_job(spec), str(run_root), "cluster")
    monkeypatch.setattr(session, "wait_until", lambda run, ended, patience: run.read_json("status.json"))
    answer = fivefold("cancel", run.run_id)
    assert (answer.code, answer.out) == (3, f"{run.run_id} is queued: None\n")
    assert run.exists(CANCEL_REQUEST)


@pytest.mark.parametrize("state", ["queued", "starting", "running", "stopping"])
def test_a_live_run_cannot_be_resumed(fivefold: Fivefold, run: RunFolder, state: str) -> None:
    change_json(run, "status.json", state=state)
    said = refused(fivefold("resume", "quick-1"), "run")
    assert f"is {state}: its controller is pid {os.getpid()} on {socket.gethostname()}" in said
    assert said.endswith("nearest valid: fivefold cancel quick-1")


@pytest.mark.parametrize(
    ("overrides", "path", "nearest"),
    [
        (["model.layers=8"], "model.layers", None),
        (["model=moe_1b"], "model", None),
        (["data.files=a.txt"], "data.files", None),
        (["train.seed=1"], "train.seed", None),
        (["train.global_batch=32"], "train.global_batch", None),
        (["engine=deepspeed"], "engine", "fivefold checkpoint reshard quick-1 --engine deepspeed"),
        (["name=other"], "name", None),
        (["train.steps=30"], "train.steps", "train.steps=80"),
        (["train.steps=0"], "train.steps", 1),
        (["layout.tp=3"], "layout.tp", "tp=2 or tp=1"),
        (["layout.pt=2"], "layout.pt", "layout.tp"),
        (["cluster=h200"], "cluster", "h200_x8"),
        (["cluster=h200_x2"], "cluster.devices_per_node", "cluster=laptop"),
        (["cluster.nodes=2"], "cluster.nodes", 1),
        (["fault.kill_rank=4"], "fault.kill_rank", 3),
        (["oops"], "override", None),
    ],
)
def test_a_resumption_that_is_refused_leaves_the_run_untouched(
    fivefold: Fivefold, run: RunFolder, run_root: Path, overrides: list[str], path: str, nearest: object
) -> None:
    before = contents(run_root)
    refused(fivefold("resume", "quick-1", *overrides, "--json"), path, nearest)
    assert contents(run_root) == before


def test_a_finished_run_cannot_be_resumed(fivefold: Fivefold, run: RunFolder, run_root: Path) -> None:
    make_checkpoint(run, 100)
    change_json(run, "status.json", state="done")
    before = contents(run_root)
    said = refused(fivefold("resume", "quick-1"), "train.steps", "train.steps=200")
    assert "100 steps of quick-1 are trained" in said
    assert contents(run_root) == before


def test_a_run_with_a_checkpoint_of_another_model_or_format_cannot_be_resumed(
    fivefold: Fivefold, run: RunFolder
) -> None:
    make_checkpoint(run, 40, job("model.layers=8"))
    place = f"{run.place}/checkpoints/step-00000040"
    assert "another model: layers 8 there, 4 here" in refused(fivefold("resume", "quick-1"), place)
    change_json(run, "checkpoints/step-00000040/manifest.json", format=3)
    assert "is of checkpoint format 3" in refused(fivefold("resume", "quick-1"), f"{place}/manifest.json")


def test_a_run_whose_text_is_gone_cannot_be_resumed(fivefold: Fivefold, run: RunFolder, run_root: Path) -> None:
    run.write_json("job.json", job("data.files=/nowhere/text.txt").model_dump(mode="json"))
    before = contents(run_root)
    refused(fivefold("resume", "quick-1"), "data.files")
    assert contents(run_root) == before


def test_a_submitted_run_is_resumed_where_it_was(fivefold: Fivefold, run: RunFolder, run_root: Path) -> None:
    change_json(run, "status.json", where="cluster")
    before = contents(run_root)
    refused(fivefold("resume", "quick-1"), "RAY_ADDRESS", "127.0.0.1:6379")
    assert contents(run_root) == before


def test_a_resumed_job_keeps_its_layout_or_is_planned_anew(run: RunFolder) -> None:
    saved = job()
    assert session.resumed_job(run, []) == saved
    assert session.resumed_job(run, ["train.steps=200"]).layout == saved.layout
    replanned = session.resumed_job(run, ["layout.pp=2"])
    assert replanned.layout.pp == 2
    assert len(replanned.layout.degrees) == 7
    spent = saved.model_copy(update={"fault": compose("quickstart", ["fault.kill_rank=3"]).fault})
    run.write_json("job.json", spent.model_dump(mode="json"))
    assert session.resumed_job(run, ["cluster.devices_per_node=2"]).fault.kill_rank == 3  # it has happened


def test_each_submission_of_a_run_has_an_id_that_ray_has_not_seen(run: RunFolder) -> None:
    class Client:
        def __init__(self) -> None:
            self.submitted: list[dict[str, Any]] = []

        def submit_job(self, **job: Any) -> None:
            self.submitted.append(job)

    client, spec = Client(), job()
    for _ in range(3):
        session.submit(run, spec, client)
        session.resume(run, spec, ["train.steps=200"])
    assert [each["submission_id"] for each in client.submitted] == ["quick-1", "quick-1-1", "quick-1-2"]
    assert client.submitted[0]["entrypoint"].endswith(f"exec fivefold control {run.place}")


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_anything_is_made(
    fivefold: Fivefold, run: RunFolder, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(run_root)
    monkeypatch.setattr(
        session.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    )
    for command in (["run", "quickstart"], ["resume", "quick-1", "train.steps=200"]):
        said = refused(fivefold(*command), "run root", "free some room, or another --run-root")
        assert "has 1 MB free, and a checkpoint of this job takes" in said
    assert contents(run_root) == before
