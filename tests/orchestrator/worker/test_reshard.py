"""A checkpoint of one engine goes on in the other: weights, moments, router biases and the count of steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_jobs import small_job, small_model

from jobs.spec import JobSpec
from orchestrator.worker.checkpoint_weights import state_in
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.main import import_engine
from orchestrator.worker.ranks import Ranks
from orchestrator.worker.schedule import learning_rate
from parallel.layout import Layout

STEPS, HALF = 6, 3

MODELS = {
    "qwen": small_model("qwen"),
    "deepseek": small_model("deepseek", shared_expert_ffn=40, first_dense_layers=1),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "megatron": {"tp": 2, "dp": 2, "ep": 2},
    "deepspeed": {"dp": 2, "ep": 2, "zero_stage": 2},
}


def job(model: str, engine: str) -> JobSpec:
    return small_job(MODELS[model], LAYOUTS[engine], engine=engine, steps=STEPS, learning_rate=5e-3)


@dataclass(frozen=True)
class Train:
    """Steps on every rank, from the beginning or a checkpoint; saves after the last."""

    job: JobSpec
    steps: range
    load: Path | None = None
    save: Path | None = None

    def __call__(self, rank: int) -> list[tuple[float, float]]:
        layout = Layout.of(self.job.layout)
        engine = import_engine(self.job.engine, "cpu").build(self.job, layout, torch.device("cpu"))
        if self.load:
            engine.load(self.load)
        curve = []
        for step in self.steps:
            at = layout.coordinates(rank)["dp"]
            batches = micro_batches(global_batch(self.job, step), at, layout.dp, 2)
            result = engine.train_step(step, learning_rate(self.job.train, step), batches)
            curve.append((result.loss, result.grad_norm))
        if self.save:
            engine.save(self.save)
        return curve


@dataclass(frozen=True)
class Adopt:
    """What one engine saved, saved by another."""

    source: JobSpec
    job: JobSpec
    load: Path
    save: Path

    def __call__(self, rank: int) -> None:
        engine = import_engine(self.job.engine, "cpu").build(self.job, Layout(), torch.device("cpu"))
        engine.adopt(state_in(self.load, self.source.engine, self.source.model), HALF)
        engine.save(self.save)


def start(ranks: Ranks, what: Train) -> list[tuple[float, float]]:
    return ranks.run(Layout.of(what.job.layout).world, _call, what)[0]  # type: ignore[no-any-return]


def _call(rank: int, what: Any) -> Any:
    return what(rank)


@pytest.mark.parametrize(
    ("model", "here", "there"), [("qwen", "megatron", "deepspeed"), ("deepseek", "deepspeed", "megatron")]
)
def test_the_other_engine_goes_on(ranks: Ranks, tmp_path: Path, model: str, here: str, there: str) -> None:
    saved, adopted = tmp_path / here, tmp_path / there
    for folder in (saved, adopted):
        folder.mkdir()
    first = Train(job(model, here), range(1, HALF + 1), save=saved)
    start(ranks, first)
    rest = range(HALF + 1, STEPS + 1)
    undisturbed = start(ranks, Train(job(model, here), rest, load=saved))
    ranks.run(1, _call, Adopt(job(model, here), job(model, there), saved, adopted))
    gone_on = start(ranks, Train(job(model, there), rest, load=adopted))
    np.testing.assert_allclose(gone_on, undisturbed, rtol=2e-5)
    # A step of Adam with other moments, or with its count begun anew, is another step: the curve would show it.
    losses = np.array([loss for loss, _ in gone_on]) / np.array([loss for loss, _ in undisturbed])
    np.testing.assert_allclose(losses, 1, rtol=1e-6)
