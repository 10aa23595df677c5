"""Whole training steps of an engine, optimizer and all, at a job's layout: what a layer's speed comes to."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch

from jobs.spec import JobSpec
from orchestrator.worker.engines.megatron import build
from orchestrator.worker.engines.protocol import Batch
from parallel.layout import Layout

WARM = 2
"""Steps that are not timed."""


def measure(rank: int, job: JobSpec, layout: Layout, micro_batch: int, steps: int, device: torch.device) -> Any:
    """Seconds of a step on this rank, which for all ranks end together, and its memory; tokens are drawn at random."""
    engine = build(job, layout, device)
    generator = np.random.default_rng(layout.coordinates(rank)["dp"])
    sequence, vocab = job.train.sequence_length, job.model.vocab
    times = []
    for step in range(1, WARM + steps + 1):
        batches = []
        for _ in range(job.train.global_batch // layout.dp // micro_batch):
            tokens = generator.integers(vocab, size=(micro_batch, sequence + 1))
            mask = np.ones((micro_batch, sequence), np.float32)
            batches.append(Batch(tokens=tokens[:, :-1], labels=tokens[:, 1:], loss_mask=mask, documents=None))
        start = time.perf_counter()
        result = engine.train_step(step, job.train.learning_rate, batches)
        times.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    median = statistics.median(times[WARM:])
    flops = job.model.flops_per_token(sequence) * job.train.global_batch * sequence / layout.world
    return {
        "work": f"{job.model.name} of {job.model.layers} layers, {_count(engine.parameters)} parameters",
        "seconds": {"median": median, "low": min(times[WARM:]), "high": max(times[WARM:]), "peak_bytes": memory},
        "flops_per_second": flops / median,
        "tokens_per_second": job.train.global_batch * sequence / median,
        "loss": result.loss,
    }


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.2f} million"
