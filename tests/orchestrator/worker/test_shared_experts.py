"""Experts that ranks share, in both engines: the run is the reference model's, whatever is copied and moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_jobs import small_job, small_model

from jobs.spec import JobSpec
from models import sparse_owners
from orchestrator.worker.engines import deepspeed, megatron, shared_experts
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.exactness.oracle import settled
from orchestrator.worker.exactness.trial import Block, Trained, Trial, train
from orchestrator.worker.exactness.verdict import compare
from orchestrator.worker.ranks import Ranks
from orchestrator.worker.schedule import learning_rate
from parallel import fssdp_sharding
from parallel.layout import Layout
from parallel.placement import Placement

STEPS = 4


def job(model: dict[str, Any], layout: dict[str, Any]) -> JobSpec:
    layout = {"expert_parallelism": "fssdp", "expert_copies": 2, **layout}
    engine = layout.pop("engine", "megatron")
    return small_job(small_model("mixtral", **model), layout, engine=engine, steps=STEPS, adam_epsilon=1e-6)


def assert_exact(ranks: Ranks, spec: JobSpec) -> None:
    spec, account = ranks.run(1, settled, spec)[0]
    verdict = compare(train(ranks, Trial(spec)), account, spec.model)
    assert verdict.exact, str(verdict)


LAYOUTS: list[dict[str, Any]] = [
    {"dp": 2, "ep": 2},
    {"tp": 2, "dp": 2, "ep": 4},
    {"dp": 4, "ep": 2},
    {"cp": 2, "dp": 2, "ep": 4},
    {"dp": 2, "pp": 2, "ep": 2},
    {"dp": 2, "pp": 2, "vpp": 2, "ep": 2},
    {"dp": 4, "ep": 4, "recompute": "full"},
    {"dp": 4, "ep": 4, "offload_activations": 0.5},
    {"tp": 2, "pp": 2, "ep": 2, "offload_activations": 0.0, "recompute": "full"},
    {"dp": 4, "ep": 4, "recompute": "selective", "recompute_modules": ("core_attn", "moe")},
    {"engine": "deepspeed", "dp": 2, "ep": 2, "zero_stage": 0},
    {"engine": "deepspeed", "dp": 4, "ep": 2, "zero_stage": 1},
    {"engine": "deepspeed", "dp": 4, "ep": 4, "zero_stage": 2},
    {"engine": "deepspeed", "dp": 2, "pp": 2, "ep": 2, "zero_stage": 1},
    {"engine": "deepspeed", "dp": 4, "ep": 4, "zero_stage": 1, "offload_activations": 0.5},
    {"engine": "deepspeed", "cp": 2, "dp": 2, "ep": 4, "zero_stage": 2, "recompute": "full"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_is_that_of_the_reference(ranks: Ranks, layout: dict[str, Any]) -> None:
    assert_exact(ranks, job({"experts": 8, "layers": 4, "aux_loss": 0.0}, layout))


@dataclass(frozen=True)
class Leg:
    """Some steps of one run, from a checkpoint or to one."""

    spec: JobSpec
    steps: range
    load: Path | None = None
    save: Path | None = None
    resharding: int = 2


@dataclass(frozen=True)
class Walked:
    trained: Trained
    owners: list[dict[int, list[int]]]
    """Of each virtual stage, at the end."""
    copies: list[int]
    """Of each step."""


def _walk(rank: int, leg: Leg) -> Walked:
    shared_experts.RESHARDING_STEPS, fssdp_sharding.SAVING = leg.resharding, -1.0  # soon, and whether it pays or not
    layout, micro_batch = Layout.of(leg.spec.layout), leg.spec.layout.micro_batch
    assert micro_batch is not None
    engine = {"megatron": megatron, "deepspeed": deepspeed}[leg.spec.engine].build(
        leg.spec, layout, torch.device("cpu")
    )
    if leg.load:
        engine.load(leg.load)
    at, losses, grad_norms, copies = layout.coordinates(rank)["dp"], [], [], []
    copy = sparse_owners.Owned.copy

    def counted(owned: sparse_owners.Owned, placements: Sequence[Placement]) -> None:
        copies.append(sum(placement.copies for placement in placements))
        copy(owned, placements)

    sparse_owners.Owned.copy = counted
    for step in leg.steps:
        batches = micro_batches(global_batch(leg.spec, step), at, layout.dp, micro_batch)
        result = engine.train_step(step, learning_rate(leg.spec.train, step), batches)
        losses.append(result.loss)
        grad_norms.append(result.grad_norm)
    if leg.save:
        engine.save(leg.save)
    owners = [owned.owners() for owned in engine._shared.owned]
    blocks = [Block(shard.name, shard.offset, shard.read().numpy()) for shard in engine.weights()]
    assert [owned.owners() for owned in engine._shared.owned] == owners
    return Walked(Trained(losses, grad_norms, blocks), owners, copies)


def walk(ranks: Ranks, leg: Leg) -> list[Walked]:
    return ranks.run(Layout.of(leg.spec.layout).world, _walk, leg)


UNEVEN: dict[str, Any] = {"experts": 8, "layers": 4, "aux_loss": 0.0}


@pytest.mark.parametrize(
    "layout",
    [
        {"dp": 4, "ep": 2, "pp": 2},
        {"engine": "deepspeed", "dp": 4, "ep": 2, "zero_stage": 1},
        {"engine": "deepspeed", "dp": 4, "ep": 4, "zero_stage": 2},
    ],
    ids=str,
)
def test_experts_move_with_their_state_and_the_run_stays_that_of_the_reference(
    ranks: Ranks, layout: dict[str, Any]
) -> None:
    spec, account = ranks.run(1, settled, job(UNEVEN, layout))[0]
    walked = walk(ranks, Leg(spec, range(1, STEPS + 1)))
    assert any(owners != sorted(owners) for each in walked[0].owners for owners in each.values())
    assert any(walked[0].copies)
    first = walked[0].trained
    whole = Trained(first.losses, first.grad_norms, [block for each in walked for block in each.trained.blocks])
    verdict = compare(whole, account, spec.model)
    assert verdict.exact, str(verdict)


@pytest.mark.parametrize(
    "layout",
    [
        {"dp": 4, "ep": 4},
        {"tp": 2, "dp": 2, "ep": 2},
        {"engine": "deepspeed", "dp": 4, "ep": 2, "zero_stage": 1},
    ],
    ids=str,
)
def test_a_run_resumes_bit_equal_with_its_owners_and_its_copies(
    ranks: Ranks, tmp_path: Path, layout: dict[str, Any]
) -> None:
    spec = job(UNEVEN, layout)
    undisturbed = walk(ranks, Leg(spec, range(1, STEPS + 1)))
    (tmp_path / "half").mkdir()
    early = walk(ranks, Leg(spec, range(1, 3), save=tmp_path / "half"))
    late = walk(ranks, Leg(spec, range(3, STEPS + 1), load=tmp_path / "half"))
    assert late[0].owners == undisturbed[0].owners
    assert early[0].copies + late[0].copies == undisturbed[0].copies
    assert any(late[0].copies)
    assert early[0].trained.losses + late[0].trained.losses == undisturbed[0].trained.losses
    for one, other in zip(late, undisturbed, strict=True):
        for block, same in zip(one.trained.blocks, other.trained.blocks, strict=True):
            assert block.name == same.name
            assert np.array_equal(block.values, same.values), block.name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"dp": 4, "ep": 4}, {"dp": 2, "ep": 2, "expert_parallelism": "ep"}),
        ({"dp": 4, "ep": 2, "expert_parallelism": "ep"}, {"tp": 2, "dp": 2, "ep": 4}),
        ({"dp": 4, "ep": 4, "pp": 2}, {"dp": 2, "ep": 2}),
        (
            {"engine": "deepspeed", "dp": 4, "ep": 4, "zero_stage": 2},
            {"engine": "deepspeed", "dp": 2, "ep": 2, "zero_stage": 1, "expert_parallelism": "ep"},
        ),
    ],
    ids=str,
)
def test_a_checkpoint_goes_on_at_another_layout(
    ranks: Ranks, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    spec, account = ranks.run(1, settled, job(UNEVEN, first))[0]
    other = spec.model_copy(update={"layout": job(UNEVEN, second).layout})
    (tmp_path / "half").mkdir()
    early = walk(ranks, Leg(spec, range(1, 3), save=tmp_path / "half"))
    late = walk(ranks, Leg(other, range(3, STEPS + 1), load=tmp_path / "half"))
    whole = Trained(
        early[0].trained.losses + late[0].trained.losses,
        early[0].trained.grad_norms + late[0].trained.grad_norms,
        [block for each in late for block in each.trained.blocks],
    )
    verdict = compare(whole, account, spec.model)
    assert verdict.exact, str(verdict)
