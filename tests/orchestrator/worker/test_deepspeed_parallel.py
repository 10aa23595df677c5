"""The DeepSpeed engine over more than data: tensor, Ulysses and pipeline parallelism against the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_jobs import small_job, small_model

from jobs.spec import JobSpec, LayoutSpec
from orchestrator.worker.engines.deepspeed import build
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.exactness.oracle import Account, oracle
from orchestrator.worker.exactness.trial import Trial, train
from orchestrator.worker.exactness.verdict import compare
from orchestrator.worker.ranks import Ranks
from orchestrator.worker.schedule import learning_rate
from parallel.capabilities import ATTENTION_RULES, EXPERT_RULES, check_job, refusal
from parallel.layout import Layout

STEPS = 10

_SHAPE: dict[str, Any] = {"layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 4}
MODELS = {kind: small_model(kind, **_SHAPE) for kind in ("dense", "qwen", "deepseek")}


def job(model: str, layout: dict[str, Any], *, precision: str = "fp32") -> JobSpec:
    train: dict[str, Any] = {"steps": STEPS, "precision": precision, "learning_rate": 5e-3, "adam_epsilon": 1e-6}
    return small_job(MODELS[model], layout, engine="deepspeed", checkpoint_interval=STEPS, **train)


# Where a layer's place in the pipeline matters; tests/exactness has every kind of layout.
EXACT = [
    job("dense", {"zero_stage": 1, "pp": 4}),
    job("deepseek", {"zero_stage": 1, "pp": 2, "stage_layers": (3, 1), "recompute": "full"}),
    job("qwen", {"zero_stage": 1, "pp": 2, "tp": 2, "etp": 2}),
]


def name_of(case: JobSpec) -> str:
    options = case.layout.model_dump(exclude_defaults=True, exclude={"micro_batch"})
    return "-".join([case.model.name, *(f"{key}{value}" for key, value in options.items())])


_account: Any = cache(lambda text: oracle(JobSpec.model_validate_json(text)))


def account(case: JobSpec) -> Account:
    """Of a case, once for all layouts of its model."""
    case = case.model_copy(update={"layout": LayoutSpec()})
    return _account(case.model_dump_json())  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", EXACT, ids=name_of)
def test_training_is_the_oracles(ranks: Ranks, case: JobSpec) -> None:
    check_job(case)
    assert refusal(ATTENTION_RULES + EXPERT_RULES, Layout.of(case.layout), case) is None
    verdict = compare(train(ranks, Trial(case), seconds=170), account(case), case.model)
    assert verdict.exact, verdict


@dataclass(frozen=True)
class Run:
    """Train `steps` on every rank, from a checkpoint or the beginning, and save at the end; a validation in between."""

    job: JobSpec
    steps: range
    load: Path | None = None
    save: Path | None = None

    def __call__(self, rank: int) -> list[float]:
        layout = Layout.of(self.job.layout)
        at, micro_batch = layout.coordinates(rank)["dp"], self.job.layout.micro_batch or 1
        engine = build(self.job, layout, torch.device("cpu"))
        if self.load:
            engine.load(self.load)
        figures = []
        for step in self.steps:
            batches = micro_batches(global_batch(self.job, step), at, layout.dp, micro_batch)
            result = engine.train_step(step, learning_rate(self.job.train, step), batches)
            # The rows of a validation may be fewer.
            shorter = micro_batches(global_batch(self.job, 0), at, layout.dp, 1)[:1]
            figures += [result.loss, result.grad_norm, engine.evaluate(shorter)]
        if self.save:
            engine.save(self.save)
        return figures


def start(ranks: Ranks, run: Run) -> list[float]:
    """Rank 0's account, once all ranks are seen to give the same one."""
    accounts = ranks.run(Layout.of(run.job.layout).world, _call, run, seconds=150)
    assert all(figures == accounts[0] for figures in accounts)
    return accounts[0]  # type: ignore[no-any-return]


def _call(rank: int, run: Run) -> list[float]:
    return run(rank)


def test_a_checkpoint_resumes_bit_equal_and_elsewhere(ranks: Ranks, tmp_path: Path) -> None:
    here, there = {"zero_stage": 1, "pp": 2, "tp": 2, "etp": 2}, {"zero_stage": 3, "cp": 2}
    start(ranks, Run(job("qwen", here), range(1, 3), save=tmp_path))
    rest = range(3, 5)
    resumed = start(ranks, Run(job("qwen", here), rest, load=tmp_path))
    assert resumed == start(ranks, Run(job("qwen", here), range(1, 5)))[6:]
    elsewhere = start(ranks, Run(job("qwen", there), rest, load=tmp_path))
    np.testing.assert_allclose(elsewhere, resumed, rtol=1e-5)


def test_bf16_trains_as_fp32_does(ranks: Ranks) -> None:
    expected = start(ranks, Run(job("dense", {"dp": 1}), range(1, 3)))
    for layout in ({"tp": 2}, {"cp": 2}, {"pp": 2}):
        half = start(ranks, Run(job("dense", layout, precision="bf16"), range(1, 3)))
        np.testing.assert_allclose(half, expected, rtol=0.02)
