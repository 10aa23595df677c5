"""A small training loop as users of torchrun and Ray Train write it, which does a fault to itself once."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

FAULT_STEP, STEPS, EVERY = 20, 60, 5


def train(folder: str, fault: str) -> None:
    """On this rank of an initialised group; each life says in `folder` when it began and when it trained a step."""
    rank, place = dist.get_rank(), Path(folder)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    saved, first = place / "checkpoint.pt", 1
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    for step in range(first, STEPS + 1):
        if step == FAULT_STEP and rank == 1 and not (place / "injected").exists():
            tell(place, "fault", step)
            (place / "injected").touch()
            inject(fault)
        optimizer.zero_grad()
        model(torch.randn(64, 256)).square().mean().backward()
        optimizer.step()
        time.sleep(0.02)
        tell(place, "step", step)
        if rank == 0 and step % EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, place / "partial.pt")
            os.replace(place / "partial.pt", saved)


def tell(place: Path, kind: str, step: int = 0) -> None:
    with (place / "told.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "step": step, "pid": os.getpid(), "at": time.time()}) + "\n")


def inject(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        ctypes.PyDLL(None).sleep(3600)


def under_torchrun(folder: str, fault: str) -> None:
    tell(Path(folder), "life")
    dist.init_process_group("gloo")
    train(folder, fault)


def under_ray_train(folder: str, fault: str) -> None:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    def loop(settings: dict[str, str]) -> None:
        tell(Path(settings["folder"]), "life")
        train(settings["folder"], settings["fault"])

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        loop,
        train_loop_config={"folder": folder, "fault": fault},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=folder, failure_config=ray.train.FailureConfig(max_failures=2)),
    ).fit()


if __name__ == "__main__":
    import sys

    {"torchrun": under_torchrun, "ray_train": under_ray_train}[sys.argv[1]](sys.argv[2], sys.argv[3])
