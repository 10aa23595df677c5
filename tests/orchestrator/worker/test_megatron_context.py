"""Context parallelism, virtual stages and packed documents: the training run of the oracle."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from small_jobs import small_job, small_model

from jobs.spec import JobSpec
from orchestrator.worker.engines.megatron import build
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.exactness.oracle import Account, oracle
from orchestrator.worker.exactness.trial import Block, Trained, Trial, train
from orchestrator.worker.exactness.verdict import compare
from orchestrator.worker.ranks import Ranks
from orchestrator.worker.schedule import learning_rate
from parallel.layout import Layout

STEPS = 4

# Of "qwen" the first two layers have no experts.
MODELS = {kind: small_model(kind, layers=4) for kind in ("dense", "mixtral")}
MODELS["qwen"] = small_model("qwen", layers=4, first_dense_layers=2)


def job(model: str, layout: Layout, way: str = "gather", *, packed: bool = False) -> JobSpec:
    degrees = {axis: degree for axis, degree in asdict(layout).items() if axis != "sp"}
    return small_job(
        MODELS[model],
        {"context_attention": way, **degrees},
        packing=packed,
        steps=STEPS,
        seed=5,  # at which no choice of a router is a near tie
        adam_epsilon=1e-6,  # With less, Adam makes as much of a gradient that is all rounding as of any other.
    )


@cache
def account(model: str, packed: bool) -> Account:
    return oracle(job(model, Layout(), packed=packed))


@pytest.mark.parametrize(
    ("model", "layout", "way", "packed"),
    [
        ("mixtral", Layout(cp=4, ep=2, etp=2), "ring", False),
        ("qwen", Layout(tp=2, cp=2, pp=2, ep=2), "ring", True),
        ("qwen", Layout(pp=2, vpp=2, cp=2), "gather", True),
    ],
    ids=lambda value: getattr(value, "label", str(value)),
)
def test_training_is_that_of_the_oracle(ranks: Ranks, model: str, layout: Layout, way: str, packed: bool) -> None:
    verdict = compare(
        train(ranks, Trial(job(model, layout, way, packed=packed))), account(model, packed), MODELS[model]
    )
    assert verdict.exact, str(verdict)


def test_two_interleaved_stages_do_not_take_gradients_for_activations(ranks: Ranks) -> None:
    """The next rank is then the previous one; see cuda_stand_in.part_gradients_from_activations."""
    verdict = compare(train(ranks, Trial(job("dense", Layout(pp=2, vpp=2)))), account("dense", False), MODELS["dense"])
    assert verdict.exact, str(verdict)


@dataclass(frozen=True)
class Leg:
    """A part of a run: from `load`, `steps`, to `save`."""

    layout: Layout
    steps: range
    load: Path | None
    save: Path

    def __call__(self, rank: int) -> tuple[Trained, list[float]]:
        """What was trained, and the loss of a validation before and after."""
        spec = job("qwen", self.layout, packed=True)
        engine = build(spec, self.layout, torch.device("cpu"))
        if self.load:
            engine.load(self.load)
        place = self.layout.coordinates(rank)["dp"], self.layout.dp, 2
        held_out = micro_batches(global_batch(spec, 0), *place)
        losses, validations = [], [engine.evaluate(held_out)]
        for step in self.steps:
            mine = micro_batches(global_batch(spec, step), *place)
            losses.append(engine.train_step(step, learning_rate(spec.train, step), mine))
        engine.save(self.save)
        validations.append(engine.evaluate(held_out))
        blocks = [Block(shard.name, shard.offset, shard.part.numpy()) for shard in engine.weights()]
        return Trained([one.loss for one in losses], [one.grad_norm for one in losses], blocks), validations


def _run_leg(rank: int, leg: Leg) -> tuple[Trained, list[float]]:
    return leg(rank)


def test_a_checkpoint_passes_between_virtual_stages_and_context_parallelism(ranks: Ranks, tmp_path: Path) -> None:
    layouts = [Layout(pp=2, vpp=2), Layout(cp=2, ep=2), Layout(pp=2, vpp=2, cp=2)]
    cuts = [range(1, 3), range(3, 4), range(4, STEPS + 1)]
    losses, grad_norms, left, load = [], [], None, None
    for layout, steps in zip(layouts, cuts, strict=True):
        save = tmp_path / layout.label.replace(" ", "-")
        save.mkdir()
        accounts = ranks.run(layout.world, _run_leg, Leg(layout, steps, load, save))
        trained, validations = accounts[0]
        losses += trained.losses
        grad_norms += trained.grad_norms
        if left is not None:
            np.testing.assert_allclose(validations[0], left, rtol=1e-6)
        left, load = validations[1], save
    blocks = [block for trained, _ in accounts for block in trained.blocks]
    verdict = compare(Trained(losses, grad_norms, blocks), account("qwen", True), MODELS["qwen"])
    assert verdict.exact, str(verdict)
