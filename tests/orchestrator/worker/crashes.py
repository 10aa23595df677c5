"""A training of a few tensors, saved and restored by the ordinary code, that is killed or refused at a chosen point.

Or it ends, and a byte of its newest checkpoint is changed, or a file cut or removed. Then it is resumed, and what it
resumes from compared. `python tests/orchestrator/worker/crashes.py 600 FILE` tries so many points and writes there what
came of them.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sample_runs import job

from orchestrator import files, manifests
from orchestrator.files import Action, FileEntry, Files, Hook, unhindered
from orchestrator.messages import Event, RankLaunch, parse_report
from orchestrator.run_folder import RunFolder
from orchestrator.worker.checkpoint import Checkpoints
from orchestrator.worker.checkpoint_tensors import PlainValues, Reader, Writer
from orchestrator.worker.reporter import Reporter
from parallel.layout import Layout

STEPS, REFUSED = 4, 200
JOB = job("checkpoint.interval=1", "policy.grace_seconds=20")
fsspec.config.conf["file"] = {"auto_mkdir": True}  # local:// stands for an object store: it is written by uploads


class Tensors:
    """An engine without a model: its state is a function of the step alone."""

    def __init__(self, step: int) -> None:
        self.state: dict[str, Any] = {
            name: torch.rand(size, generator=torch.Generator().manual_seed(100 * step + size))
            for name, size in (("weight", 700), ("moment", 300))
        }
        self.state["steps"] = step

    def save(self, folder: Path, before: Hook = unhindered) -> list[FileEntry]:
        target = Files(folder, before)
        torch_checkpoint.save(self.state, storage_writer=Writer(target, {"common.json": b"{}"}))
        return list(target.written.values())

    def load(self, folder: Path) -> None:
        torch_checkpoint.load(self.state, storage_reader=Reader(folder), planner=_Planner())

    def equals(self, other: Tensors) -> bool:
        return all(bool(torch.as_tensor(self.state[key] == other.state[key]).all()) for key in self.state)


class _Planner(PlainValues, torch_checkpoint.DefaultLoadPlanner):
    pass


@dataclass(frozen=True)
class Trial:
    """Point `at` of a training's saves.

    kind: kill, there; refuse that one change, as a full disk does; or flip, cut or delete a file once it is over.
    """

    place: str
    at: int
    kind: str
    keep: int


def train(trial: Trial, descriptor: int, hook: Hook) -> int:
    """Restore the newest whole checkpoint and train to the end. Returns the step that it went on from."""
    files._BUFFER_BYTES = 1024  # many writes a file, so that a kill tears it
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    run = RunFolder(trial.place)
    launch = RankLaunch(
        run_id=run.run_id,
        attempt=1,
        rank=0,
        local_rank=0,
        store_address="",
        store_port=1,
        run_folder=trial.place,
        job=JOB.model_copy(update={"checkpoint": JOB.checkpoint.model_copy(update={"keep": trial.keep})}),
        checkpoint_steps=tuple(manifests.steps(run)),
    )
    checkpoints = Checkpoints(launch, Layout(), Reporter(launch, descriptor), hook)
    engine: Any = Tensors(0)
    start = checkpoints.restore(engine)
    assert engine.equals(Tensors(start)), f"what was restored is not the state of step {start}"
    for step in range(start + 1, STEPS + 1):
        checkpoints.save(Tensors(step), step, ())
    checkpoints.close()
    return start


def in_a_fork(trial: Trial, hook: Hook) -> tuple[int, list[Event]]:
    """How a training ended: the step it began at, or minus a signal, or REFUSED; what it told."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        code = REFUSED
        try:
            ours.close()
            code = train(trial, theirs.detach(), hook)
        except BaseException as error:
            print(f"{trial}: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    theirs.close()
    told = []
    while packet := ours.recv(1 << 20):
        report = parse_report(packet)
        assert isinstance(report, Event)
        told.append(report)
    ours.close()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told


def fault(trial: Trial) -> Hook:
    counted = 0

    def hook(action: Action, name: str) -> None:
        nonlocal counted
        counted += 1
        if counted == trial.at:
            if trial.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device", name)

    return hook


def damage(run: RunFolder, draw: random.Random, kind: str) -> str:
    """To a file of the newest checkpoint, the manifest among them. Returns its name."""
    folder = manifests.folder_name(manifests.steps(run)[0])
    name = draw.choice(run.names(folder))
    path = Path(run.path(f"{folder}/{name}"))
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    return name


def attempt(seed: int, folder: Path) -> str:
    """One seeded fault and the recovery from it. Returns what came of it; AssertionError for a wrong resume."""
    draw = random.Random(seed)
    uploaded = draw.random() < 0.4
    place = f"{'local://' if uploaded else ''}{folder}/run-{seed}"
    kind = draw.choice(("kill", "kill", "kill", "refuse", "refuse", "flip", "cut", "delete"))
    spoilt = kind in ("flip", "cut", "delete")
    trial = Trial(place, draw.randint(1, 75), kind, draw.choice((2, 3) if spoilt else (1, 2)))
    ended, told = in_a_fork(trial, unhindered if spoilt else fault(trial))
    assert ended in (0, -signal.SIGKILL), f"seed {seed}: {trial} ended with {ended}"
    run = RunFolder(place)
    least, most = max((event.data["step"] for event in told if event.kind == "checkpoint_written"), default=0), STEPS
    where = "uploading" if uploaded else "on a disk"
    if spoilt:  # which was the newest is known; uploads leave steps out
        others = manifests.steps(run)[1:]
        name, least = damage(run, draw, kind), next(iter(others), 0)
        most, seen = least, (kind, name) != ("delete", "manifest.json")
    started, told = in_a_fork(trial, unhindered)
    if spoilt and seen:
        found = [event for event in told if event.kind == "checkpoint_damaged"]
        assert [event.data["step"] for event in found] == [STEPS], f"seed {seed}: {trial}, {name}: {told}"
        assert name in found[0].message
        if not others:
            assert started == REFUSED, f"seed {seed}: {trial}, {name}: went on from {started} with nothing whole"
            return f"{kind}, {where}, refused: no other is there"
    assert least <= started <= most, f"seed {seed}: {trial} had written step {least}, and resumed from {started}"
    newest = manifests.steps(run)[0]
    assert (newest, manifests.verified(run, newest)[1]) == (STEPS, []), f"seed {seed}: {trial} is not whole at its end"
    if spoilt:
        return f"{kind}, {where}, resumed from the one before"
    return f"killed, {where}, resumed from {started}" if ended else f"refused, {where}, trained on"


def attempts(seeds: range, told: Callable[[str], None] = print) -> Counter[str]:
    began, found = time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="fivefold-crashes-") as folder:
        tempfile.tempdir = folder
        try:
            for seed in seeds:
                found[attempt(seed, Path(folder))] += 1
        finally:
            tempfile.tempdir = None
    for what, count in sorted(found.items()):
        told(f"{count:5d}  {what}")
    told(f"{sum(found.values()):5d}  points, no wrong resume, {time.monotonic() - began:.0f} s")
    return found


if __name__ == "__main__":
    count, kept = int(sys.argv[1]), Path(sys.argv[2])
    document = {
        "command": f"python tests/orchestrator/worker/crashes.py {count} {kept}",
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "points": count,
        "wrong_resumes": 0,  # the first would have ended this
        "came_of_them": dict(sorted(attempts(range(count)).items())),
    }
    kept.write_text(json.dumps(document, indent=1) + "\n")
