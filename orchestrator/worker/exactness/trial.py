"""What an engine makes of a job at a layout, on forked ranks: the run that is held against the oracle."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch

from jobs.spec import JobSpec
from models.weights import Shard
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.main import import_engine
from orchestrator.worker.ranks import Ranks
from orchestrator.worker.schedule import learning_rate
from parallel.layout import Layout


@dataclass(frozen=True)
class Block:
    """What a rank holds of a final weight; numpy, since a tensor crosses processes as a file that both hold open."""

    name: str
    offset: tuple[int, ...]
    values: np.ndarray

    def distance(self, whole: np.ndarray) -> float:
        """L2 norm of the difference to this block of `whole`."""
        ends = (at + length for at, length in zip(self.offset, self.values.shape, strict=True))
        same = whole[tuple(slice(at, end) for at, end in zip(self.offset, ends, strict=True))]
        return float(np.linalg.norm((self.values.astype(np.float64) - same).ravel()))


@dataclass(frozen=True)
class Trial:
    """A job with every degree and the micro-batch filled in, to be trained as it is."""

    job: JobSpec
    tell: bool = False
    """Rank 0 prints a JSON line a step."""


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    grad_norms: list[float]
    blocks: list[Block]
    """Of all ranks, replicas too."""


def train(ranks: Ranks, trial: Trial, seconds: float = 120) -> Trained:
    """Train `trial` on as many of `ranks` as its layout has. RuntimeError where ranks give different figures."""
    accounts = ranks.run(Layout.of(trial.job.layout).world, train_rank, trial, seconds=seconds)
    for rank, account in enumerate(accounts):
        if (account.losses, account.grad_norms) != (accounts[0].losses, accounts[0].grad_norms):
            raise RuntimeError(f"ranks 0 and {rank} tell of different losses or gradient norms")
    blocks = [block for account in accounts for block in account.blocks]
    return Trained(accounts[0].losses, accounts[0].grad_norms, blocks)


def train_rank(rank: int, trial: Trial) -> Trained:
    """One rank's part, once torch.distributed is initialised."""
    job, layout = trial.job, Layout.of(trial.job.layout)
    assert job.layout.micro_batch is not None, "the job is resolved"
    device = torch.device("cuda", torch.cuda.current_device()) if job.cluster.device == "cuda" else torch.device("cpu")
    engine = import_engine(job.engine, job.cluster.device).build(job, layout, device)
    at = layout.coordinates(rank)["dp"]
    losses, grad_norms = [], []
    for step in range(1, job.train.steps + 1):
        whole = global_batch(job, step)
        mine = micro_batches(whole, at, layout.dp, job.layout.micro_batch)
        result = engine.train_step(step, learning_rate(job.train, step), mine)
        losses.append(result.loss)
        grad_norms.append(result.grad_norm)
        if trial.tell and rank == 0:
            print(json.dumps({"step": step, "loss": result.loss, "grad_norm": result.grad_norm}), flush=True)
    return Trained(losses, grad_norms, [_block(shard) for shard in engine.weights()])


def _block(shard: Shard) -> Block:
    return Block(shard.name, shard.offset, shard.read().float().cpu().numpy())
