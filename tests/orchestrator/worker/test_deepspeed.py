"""The DeepSpeed engine against the oracle: ZeRO stages, experts over ranks, offload, recomputation, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_jobs import small_job, small_model

from jobs.spec import JobSpec
from models.weights import Shard
from orchestrator.worker.engines.deepspeed import build
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.exactness.oracle import oracle
from orchestrator.worker.exactness.trial import Trial, train
from orchestrator.worker.exactness.verdict import compare
from orchestrator.worker.ranks import Ranks
from orchestrator.worker.schedule import learning_rate
from parallel.layout import Layout

STEPS, HALF = 4, 2

MODELS = {
    "mixtral": small_model("mixtral"),
    "deepseek": small_model("deepseek", shared_expert_ffn=40, first_dense_layers=1, router_scale=2.5),
    # Eight experts, and sixteen tokens that visit one each: in most micro-batches some are visited by nobody.
    "sparse": small_model("mixtral", layers=1, experts=8, top_k=1, expert_ffn=8, router_normalize_top_k=False),
}


def job(model: str, layout: dict[str, Any], precision: str = "fp32", packing: bool = False) -> JobSpec:
    train: dict[str, Any] = {"steps": STEPS, "precision": precision, "learning_rate": 5e-3}
    return small_job(MODELS[model], layout, engine="deepspeed", packing=packing, checkpoint_interval=HALF, **train)


EXACT = [
    job("mixtral", {"zero_stage": 0, "dp": 4, "ep": 2}),  # DeepSpeed's norm is wrong here, and so its clipping
    job("mixtral", {"zero_stage": 1, "dp": 4, "ep": 2, "recompute": "full"}),
    job("deepseek", {"zero_stage": 2, "dp": 2, "ep": 2}, packing=True),
    job("sparse", {"zero_stage": 3, "dp": 2, "micro_batch": 1, "recompute": "full"}),
    job("sparse", {"zero_stage": 2, "dp": 2, "ep": 2, "micro_batch": 1}),
    job("mixtral", {"zero_stage": 2, "dp": 4, "ep": 2, "offload_optimizer": "cpu"}),
    job("mixtral", {"zero_stage": 3, "dp": 2, "offload_optimizer": "cpu", "offload_parameters": "cpu"}),
]


def name_of(case: JobSpec) -> str:
    options = case.layout.model_dump(exclude_defaults=True, exclude={"micro_batch"})
    return "-".join([case.model.name, *(f"{key}{value}" for key, value in options.items())])


@pytest.mark.parametrize("case", EXACT, ids=name_of)
def test_training_is_the_oracles(ranks: Ranks, case: JobSpec) -> None:
    verdict = compare(train(ranks, Trial(case), seconds=170), oracle(case), case.model)
    assert verdict.exact, verdict


@dataclass(frozen=True)
class Run:
    """Steps to train on every rank, from a checkpoint or from the beginning, and a step to save after."""

    job: JobSpec
    steps: range
    load: Path | None = None
    save: Path | None = None
    evaluates: bool = False

    def __call__(self, rank: int) -> list[tuple[float, float]]:
        layout = Layout.of(self.job.layout)
        at, micro_batch = layout.coordinates(rank)["dp"], self.job.layout.micro_batch or 1
        engine = build(self.job, layout, torch.device("cpu"))
        if self.load:
            engine.load(self.load)
        curve = []
        for step in self.steps:
            batches = micro_batches(global_batch(self.job, step), at, layout.dp, micro_batch)
            result = engine.train_step(step, learning_rate(self.job.train, step), batches)
            curve.append((result.loss, result.grad_norm))
            if self.evaluates:
                engine.evaluate(batches)
            if step == HALF and self.save:
                engine.save(self.save)
        return curve


def start(ranks: Ranks, run: Run) -> list[tuple[float, float]]:
    return ranks.run(Layout.of(run.job.layout).world, _call, run)[0]  # type: ignore[no-any-return]


def _call(rank: int, run: Any) -> Any:
    return run(rank)


SAVED = [
    (job("deepseek", {"zero_stage": 2, "dp": 4, "ep": 2}), job("deepseek", {"zero_stage": 1, "dp": 1})),
    (job("mixtral", {"zero_stage": 3, "dp": 2}), job("mixtral", {"zero_stage": 1, "dp": 4, "ep": 4})),
    (job("mixtral", {"zero_stage": 2, "dp": 2, "offload_optimizer": "cpu"}, "bf16"), None),
]


@pytest.mark.parametrize(("here", "there"), SAVED, ids=lambda case: name_of(case) if case else "")
def test_a_checkpoint_resumes_bit_equal_and_elsewhere(
    ranks: Ranks, tmp_path: Path, here: JobSpec, there: JobSpec | None
) -> None:
    undisturbed = start(ranks, Run(here, range(1, STEPS + 1), save=tmp_path))[HALF:]
    second_half = range(HALF + 1, STEPS + 1)
    assert start(ranks, Run(here, second_half, load=tmp_path)) == undisturbed
    if there:
        np.testing.assert_allclose(start(ranks, Run(there, second_half, load=tmp_path)), undisturbed, rtol=1e-5)


def test_bf16_trains_as_fp32_does(ranks: Ranks) -> None:
    fp32 = start(ranks, Run(job("mixtral", {"zero_stage": 1, "dp": 2}), range(1, STEPS + 1)))
    for stage in (1, 2, 3):
        half = start(ranks, Run(job("mixtral", {"zero_stage": stage, "dp": 2}, "bf16"), range(1, STEPS + 1)))
        np.testing.assert_allclose(half, fp32, rtol=0.02)


def test_evaluation_leaves_training_as_it_was(ranks: Ranks) -> None:
    spec = job("deepseek", {"zero_stage": 3, "dp": 2})
    plain, interrupted = (start(ranks, Run(spec, range(1, 3), evaluates=evaluates)) for evaluates in (False, True))
    assert interrupted == plain


@dataclass(frozen=True)
class Reset:
    """Train away from the first weights, and set them again."""

    job: JobSpec

    def __call__(self, rank: int) -> bool:
        engine = build(self.job, Layout.of(self.job.layout), torch.device("cpu"))
        first = {shard.name: shard.read() for shard in engine.weights()}
        batches = micro_batches(global_batch(self.job, 1), rank, 2, 2)
        before = engine.train_step(1, 1e-2, batches)
        assert not torch.equal(_named(engine.weights())["head.weight"], first["head.weight"])
        engine.set_weights(lambda shard: first[shard.name])
        for name, weight in _named(engine.weights()).items():
            torch.testing.assert_close(weight, first[name], rtol=0, atol=0)
        return engine.train_step(1, 1e-2, batches) == before


def _named(shards: Any) -> dict[str, torch.Tensor]:
    found: list[Shard] = list(shards)
    return {shard.name: shard.read() for shard in found}


@pytest.mark.parametrize("layout", [{"zero_stage": 2, "ep": 2}, {"zero_stage": 3}], ids=str)
def test_weights_that_are_set_begin_a_run_anew(ranks: Ranks, layout: dict[str, Any]) -> None:
    assert ranks.run(2, _call, Reset(job("mixtral", {"dp": 2} | layout))) == [True, True]
