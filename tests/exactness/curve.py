"""Two hundred steps in bf16 at layouts of several GPUs, against the run-to-run noise of one.

    python tests/exactness/curve.py --layouts tp=2 dp=2 dp=2,ep=2 pp=2 cp=2 --json curve.json

What one GPU's noise is: the same job from the same weights, each step on the same sequences, in another order: rows are
permuted within the global batch and taken in other micro-batches. Exactly computed, these runs were one run; in bf16
they part by rounding alone. A run's distance is the largest, over windows of ten steps, between its mean loss and that
of the single-GPU runs (for one of these: of the others). A layout stands where each of its runs, in two orders too, has
a distance of at most twice the largest of theirs.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs import compose
from jobs.spec import DEGREES, JobSpec
from orchestrator.worker.data import open_data
from orchestrator.worker.engines.protocol import Batch
from orchestrator.worker.exactness.batches import micro_batches
from orchestrator.worker.main import import_engine
from orchestrator.worker.ranks import Ranks
from orchestrator.worker.schedule import learning_rate
from parallel.capabilities import why_refused
from parallel.layout import Layout

WINDOW, ALLOWED = 10, 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="quickstart")
    parser.add_argument("--layouts", nargs="+", default=["tp=2", "dp=2", "dp=2,ep=2", "pp=2", "cp=2"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--singles", type=int, default=8, help="runs of one GPU")
    parser.add_argument("--runs", type=int, default=2, help="of each layout")
    parser.add_argument("--side-by-side", type=int, default=6, metavar="RUNS")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    overrides = ["train.precision=bf16", f"train.steps={options.steps}", f"cluster.device={options.device}"]
    job = compose.compose(options.job, overrides)
    ranks = Ranks(options.device)
    micro = [size for size in (8, 4, 2, 1) if job.train.global_batch % size == 0]
    with ThreadPoolExecutor(options.side_by_side) as pool:
        alone = [pool.submit(curve, ranks, at(job, "", micro[n % len(micro)]), order=n) for n in range(options.singles)]
        placed = {
            text: [pool.submit(curve, ranks, at(job, text, 4), order) for order in range(options.runs)]
            for text in options.layouts
        }
        singles = np.array([run.result() for run in alone])
        noise = [distance(one, np.delete(singles, n, 0)) for n, one in enumerate(singles)]
        print(f"noise of one {options.device} device over {options.singles} runs: {max(noise):.2e} nats", flush=True)
        found = []
        for text, runs in placed.items():
            losses = [run.result() for run in runs]
            largest = max(distance(each, singles) for each in losses)
            found.append({"layout": text, "distance": largest, "losses": np.array(losses).tolist()})
            print(f"{text:<16} {largest:.2e} nats, at most {ALLOWED * max(noise):.2e}", flush=True)
    within = all(each["distance"] <= ALLOWED * max(noise) for each in found)
    print("within the noise of one device" if within else "NOT within the noise of one device")
    if options.json:
        document = {
            "command": sys.argv,
            "noise": noise,
            "singles": singles.tolist(),
            "layouts": found,
            "within": within,
        }
        options.json.write_text(json.dumps(document) + "\n")
    return 0 if within else 1


def at(job: JobSpec, layout: str, micro_batch: int) -> JobSpec:
    """`tp=2,ep=2`, and every other degree 1. ValueError where the engine does not run it."""
    degrees: dict[str, Any] = dict.fromkeys(DEGREES, 1)
    degrees |= {axis: int(degree) for axis, degree in (pair.split("=") for pair in layout.split(",") if pair)}
    placed = job.model_copy(update={"layout": job.layout.model_copy(update={**degrees, "micro_batch": micro_batch})})
    if reason := why_refused(placed):
        raise ValueError(f"{layout}: {reason}")
    return placed


def curve(ranks: Ranks, job: JobSpec, order: int) -> np.ndarray:
    """Loss of each step, nats."""
    return np.array(ranks.run(Layout.of(job.layout).world, train, job, order, seconds=1800)[0])


def train(rank: int, job: JobSpec, order: int) -> list[float]:
    layout, whole = Layout.of(job.layout), job.train.global_batch
    device = torch.device("cuda", torch.cuda.current_device()) if job.cluster.device == "cuda" else torch.device("cpu")
    engine = import_engine(job.engine, job.cluster.device).build(job, layout, device)
    text = open_data(job.data, job.train, job.model.vocab)
    assert job.layout.micro_batch is not None
    losses = []
    for step in range(1, job.train.steps + 1):
        (batch,) = text.batches(step, 0, 1, whole)
        rows = np.random.default_rng((order, step)).permutation(whole)
        documents = None if batch.documents is None else batch.documents[rows]
        mixed = Batch(batch.tokens[rows], batch.labels[rows], batch.loss_mask[rows], documents)
        mine = micro_batches(mixed, layout.coordinates(rank)["dp"], layout.dp, job.layout.micro_batch)
        losses.append(engine.train_step(step, learning_rate(job.train, step), mine).loss)
    return losses


def distance(losses: np.ndarray, others: np.ndarray) -> float:
    """Between a run's curve and the mean of others, [runs, steps], nats."""
    kernel = np.ones(min(WINDOW, len(losses))) / min(WINDOW, len(losses))
    return float(np.abs(np.convolve(losses - others.mean(0), kernel, "valid")).max())


if __name__ == "__main__":
    sys.exit(main())
