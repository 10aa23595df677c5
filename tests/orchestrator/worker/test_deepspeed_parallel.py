"""The DeepSpeed engine over more than data: tensor, Ulysses and pipeline parallelism against the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.architecture import ModelArchitecture
from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec
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

_SHAPE: dict[str, Any] = {"init_std": 0.1, "layers": 4, "hidden": 32, "heads": 8, "kv_heads": 4, "head_dim": 4}
_SHAPE |= {"ffn": 48, "vocab": 64}
_MOE: dict[str, Any] = {"experts": 4, "top_k": 2, "expert_ffn": 24, "aux_loss": 0.05, "z_loss": 0.01}
MODELS = {
    "dense": ModelArchitecture(name="dense", **_SHAPE),
    # Of the two stages of pp2 one has a dense layer and the other a copy of the embedding.
    "qwen": ModelArchitecture(
        name="qwen",
        **_SHAPE,
        **_MOE,
        tied_embeddings=True,
        attention_bias=True,
        qk_norm=True,
        shared_expert_ffn=40,
        shared_expert_gate=True,
        first_dense_layers=1,
        router_normalize_top_k=False,
    ),
    "deepseek": ModelArchitecture(name="deepseek", **_SHAPE, **_MOE, router_score="sigmoid", router_bias=True),
}


def job(model: str, layout: dict[str, Any], *, precision: str = "fp32", packing: bool = False) -> JobSpec:
    return JobSpec(
        name=model,
        engine="deepspeed",
        model=MODELS[model],
        data=DataSpec(files=("unused",), packing=packing),
        cluster=ClusterSpec(name="test", device="cpu", hardware="laptop", devices_per_node=8),
        layout=LayoutSpec(**{"micro_batch": 2} | layout),
        train=TrainSpec(
            steps=STEPS,
            sequence_length=16,
            global_batch=8,
            precision=precision,
            learning_rate=5e-3,
            weight_decay=0.1,
            adam_epsilon=1e-6,
            clip_grad_norm=0.5,
        ),
        checkpoint=CheckpointSpec(interval=STEPS),
        policy=PolicySpec(),
    )


# Where a layer's place in the pipeline matters; tests/exactness has every kind of layout.
EXACT = [
    job("dense", {"zero_stage": 1, "pp": 4}),
    job("deepseek", {"zero_stage": 1, "pp": 2, "recompute": "full"}),
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
