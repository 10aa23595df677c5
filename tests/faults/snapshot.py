"""How long training waits for a copy of its state: Fivefold's snapshots beside torch's asynchronous checkpoints.

Both copy behind a forward and backward of so many seconds of matrix products, and are waited for before the update that
follows. What bounds it: a copy reads and writes every byte once, on a core that the products leave.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from jobs.compose import compose
from orchestrator.messages import RankLaunch
from orchestrator.worker.engines.protocol import Engine
from orchestrator.worker.reporter import Reporter
from orchestrator.worker.snapshots import Snapshots

TENSORS = 64


class State:
    """As an engine's: some tensors, of so many megabytes together."""

    def __init__(self, megabytes: int) -> None:
        self.tensors = [torch.rand(megabytes * 1_000_000 // 4 // TENSORS) for _ in range(TENSORS)]

    def state(self) -> list[torch.Tensor]:
        return self.tensors


def compute(seconds: float) -> None:
    one, until = torch.rand(512, 512), time.monotonic() + seconds
    while time.monotonic() < until:
        one = torch.mm(one, one).clamp(0, 1)


def snapshots(state: State, times: int, seconds: float, folder: Path) -> list[float]:
    job = compose("quickstart", ["checkpoint.snapshot_interval=1"])
    launch = RankLaunch(
        run_id="bench",
        attempt=1,
        rank=0,
        local_rank=0,
        store_address="",
        store_port=1,
        run_folder=str(folder),
        job=job,
        checkpoint_steps=(),
    )
    _, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = Snapshots(launch, os.memfd_create("snapshots"), Reporter(launch, theirs.detach()))
    kept.restore(cast(Engine, state), 0)
    stalls = []
    for step in range(1, times + 1):
        kept.settle()
        kept.stall_seconds = 0.0
        kept.begin(cast(Engine, state), step)
        compute(seconds)
        kept.finish()
        stalls.append(kept.stall_seconds)
    return stalls


def asynchronous(state: State, times: int, seconds: float, folder: Path) -> list[float]:
    """torch.distributed.checkpoint.async_save with its default stager, which reuses its buffers, and its thread."""
    stager = DefaultStager(
        StagingOptions(use_pinned_memory=False, use_shared_memory=False, use_non_blocking_copy=False)
    )
    stalls = []
    for step in range(1, times + 1):
        named = {str(at): tensor for at, tensor in enumerate(state.tensors)}
        began = time.monotonic()
        response = torch_checkpoint.async_save(named, checkpoint_id=folder / str(step), async_stager=stager)
        stall = time.monotonic() - began
        compute(seconds)
        began = time.monotonic()
        staging: Any = getattr(response, "staging_completion", None)
        if staging is not None:
            staging.result()
        stalls.append(stall + time.monotonic() - began)
        getattr(response, "upload_completion", response).result()
    return stalls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a forward and backward")
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--json", metavar="FILE", help="where the figures are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    state, rows = State(options.megabytes), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in (("fivefold", snapshots), ("torch async_save", asynchronous)):
            stalls = measure(state, options.times, options.seconds, Path(folder))
            # The first two make the memory that the others reuse.
            figures = {"first_two_ms": max(stalls[:2]), "median_ms": statistics.median(stalls[2:])}
            rows[name] = {what: 1e3 * each for what, each in (figures | {"longest_ms": max(stalls[2:])}).items()}
            told = "   ".join(f"{what} {value:.1f}" for what, value in rows[name].items())
            print(f"{name:<18}{told}")
    if options.json:
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
        given = {"megabytes": options.megabytes, "seconds": options.seconds, "times": options.times}
        Path(options.json).write_text(json.dumps({"machine": machine, **given, "stall": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
