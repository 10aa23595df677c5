"""Context parallelism, virtual stages and packed documents: the training run of the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Training, trained

from jobs.architecture import ModelArchitecture
from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec
from orchestrator.worker.engines.megatron import build
from orchestrator.worker.engines.protocol import Batch
from orchestrator.worker.ranks import Ranks
from parallel.layout import Layout

STEPS, HALF = 6, 3
SEQUENCE, GLOBAL_BATCH = 16, 8
VOCAB = 64

# Weights large enough that no router's choice hangs on rounding: a near tie decided otherwise is another model.
_SHAPE = {"init_std": 0.1, "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48}
_MOE = {"experts": 4, "top_k": 2, "expert_ffn": 24, "aux_loss": 0.05, "z_loss": 0.01}
MODELS = {
    "dense": ModelArchitecture(name="dense", vocab=VOCAB, **_SHAPE),
    "mixtral": ModelArchitecture(name="mixtral", vocab=VOCAB, **_SHAPE, **_MOE),
    # The first two layers have no experts, and the last stage holds a copy of the embedding.
    "qwen": ModelArchitecture(
        name="qwen",
        vocab=VOCAB,
        **_SHAPE,
        **_MOE,
        tied_embeddings=True,
        attention_bias=True,
        qk_norm=True,
        shared_expert_ffn=40,
        shared_expert_gate=True,
        first_dense_layers=2,
        router_normalize_top_k=False,
    ),
}


def job(model: str, way: str = "gather") -> JobSpec:
    return JobSpec(
        name=model,
        model=MODELS[model],
        data=DataSpec(files=("unused",)),
        cluster=ClusterSpec(name="test", device="cpu", hardware="laptop", devices_per_node=8),
        layout=LayoutSpec(context_attention=way),
        train=TrainSpec(
            steps=STEPS,
            sequence_length=SEQUENCE,
            global_batch=GLOBAL_BATCH,
            precision="fp32",
            learning_rate=1e-2,
            weight_decay=0.1,
            adam_epsilon=1e-6,  # With less, Adam makes as much of a gradient that is all rounding as of any other.
            clip_grad_norm=0.5,
        ),
        checkpoint=CheckpointSpec(interval=HALF),
        policy=PolicySpec(),
    )


def rate(step: int) -> float:
    return 1e-2 / step


def global_batch(step: int, packed: bool) -> Batch:
    """Depends on the step alone; labels are counted unevenly; rows are cut into documents unalike, some not at all."""
    draw = np.random.default_rng(step)
    text = draw.integers(0, VOCAB, (GLOBAL_BATCH, SEQUENCE + 1))
    mask = (draw.random((GLOBAL_BATCH, SEQUENCE)) < np.linspace(0.3, 1, GLOBAL_BATCH)[:, None]).astype(np.float32)
    begins = draw.random((GLOBAL_BATCH, SEQUENCE)) < np.linspace(0, 0.5, GLOBAL_BATCH)[:, None]
    return Batch(text[:, :-1], text[:, 1:], mask, begins.cumsum(1) if packed else None)


def share(batch: Batch, layout: Layout, rank: int, micro_batch: int) -> list[Batch]:
    """The micro-batches of a rank's dp coordinate."""
    mine = np.arange(GLOBAL_BATCH)[layout.coordinates(rank)["dp"] :: layout.dp].reshape(-1, micro_batch)
    arrays = (batch.tokens, batch.labels, batch.loss_mask, batch.documents)
    return [Batch(*(None if array is None else array[rows] for array in arrays)) for rows in mine]


@cache
def expected(model: str, packed: bool) -> Training:
    return trained(job(model), STEPS, lambda step: global_batch(step, packed), rate)


@dataclass(frozen=True)
class Run:
    """Load, train `steps`, save; what each rank saw and holds."""

    job: JobSpec
    layout: Layout
    packed: bool
    steps: range = range(1, STEPS + 1)
    load: Path | None = None
    save: Path | None = None
    micro_batch: int = 2

    def __call__(self, rank: int) -> dict[str, Any]:
        engine = build(self.job, self.layout, torch.device("cpu"))
        if self.load:
            engine.load(self.load)
        curve = []
        for step in self.steps:
            done = engine.train_step(step, rate(step), self._share(step, rank))
            curve.append((done.loss, done.grad_norm))
        if self.save:
            engine.save(self.save)
        validation = engine.evaluate(self._share(0, rank))
        blocks = [(shard.name, shard.shape, shard.offset, shard.part.numpy()) for shard in engine.weights()]
        return {"curve": curve, "validation": validation, "parameters": engine.parameters, "blocks": blocks}

    def _share(self, step: int, rank: int) -> list[Batch]:
        return share(global_batch(step, self.packed), self.layout, rank, self.micro_batch)


def _call(rank: int, run: Run) -> dict[str, Any]:
    return run(rank)


def assert_as_expected(ranks: Ranks, run: Run) -> None:
    """Losses and gradient norms to 1e-5, whole weights after the last step to 1e-4, alike on all ranks."""
    oracle = expected(run.job.name, run.packed)
    seen: dict[str, int] = {}
    for account in ranks.run(run.layout.world, _call, run):
        np.testing.assert_allclose(account["curve"], oracle.curve[run.steps.start - 1 : run.steps.stop - 1], rtol=1e-5)
        assert account["parameters"] == run.job.model.parameters
        if run.steps.stop <= STEPS:
            continue
        np.testing.assert_allclose(account["validation"], oracle.validation, rtol=1e-5)
        for name, shape, offset, block in account["blocks"]:
            whole = oracle.weights[name]
            assert tuple(whole.shape) == shape
            at = tuple(slice(start, start + length) for start, length in zip(offset, block.shape, strict=True))
            assert np.linalg.norm(block - whole[at].numpy()) <= 1e-4 * np.linalg.norm(whole[at]), name
            seen[name] = seen.get(name, 0) + block.size
    if run.steps.stop > STEPS:
        assert all(seen[name] >= whole.numel() for name, whole in oracle.weights.items())


CASES = [
    ("dense", Layout(), "gather", True),
    ("dense", Layout(cp=2), "ring", False),
    ("mixtral", Layout(cp=2), "gather", False),
    ("mixtral", Layout(cp=2), "gather", True),
    ("mixtral", Layout(cp=2, dp=2, ep=4), "ring", True),
    ("mixtral", Layout(cp=4, ep=2, etp=2), "ring", True),
    ("mixtral", Layout(tp=2, cp=2, ep=2), "gather", True),
    ("qwen", Layout(tp=2, cp=2, pp=2, ep=2), "ring", True),
    ("dense", Layout(pp=2, vpp=2), "gather", False),
    ("mixtral", Layout(pp=2, vpp=2, ep=2, dp=2), "gather", False),
    ("qwen", Layout(pp=2, vpp=2, cp=2), "gather", True),
    ("qwen", Layout(pp=4, vpp=1, cp=2, etp=2), "gather", False),
]


@pytest.mark.parametrize(
    ("model", "layout", "way", "packed"), CASES, ids=lambda value: getattr(value, "label", str(value))
)
def test_training_is_that_of_the_oracle(ranks: Ranks, model: str, layout: Layout, way: str, packed: bool) -> None:
    assert_as_expected(ranks, Run(job(model, way), layout, packed))
