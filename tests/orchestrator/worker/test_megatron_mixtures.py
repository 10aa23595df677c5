"""Mixtures in the Megatron engine, against the reference model: dispatch, dropping, balancing, sharded optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_jobs import small_job, small_model

from jobs.errors import InputError
from jobs.spec import JobSpec
from orchestrator.worker.engines.megatron import build
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.exactness.oracle import Account, settled
from orchestrator.worker.exactness.trial import Block, Trained, Trial, train
from orchestrator.worker.exactness.verdict import compare
from orchestrator.worker.ranks import Ranks
from orchestrator.worker.schedule import learning_rate
from parallel.capabilities import ATTENTION_RULES, EXPERT_RULES, check_job, refusal
from parallel.layout import Layout

STEPS, HALF = 4, 2

_BALANCED = {"router_bias": True, "router_bias_rate": 0.01}
_SHARED = {"shared_expert_ffn": 40, "shared_expert_gate": True}


def job(model: dict[str, Any], layout: dict[str, Any]) -> JobSpec:
    # With a smaller epsilon Adam makes as much of a gradient that is all rounding as of any other.
    train: dict[str, Any] = {"steps": STEPS, "adam_epsilon": 1e-6}
    return small_job(small_model("mixtral", **model), layout, checkpoint_interval=HALF, **train)


def expected(ranks: Ranks, spec: JobSpec) -> tuple[JobSpec, Account]:
    """What the reference model makes of `spec`, at a seed where no choice hangs on rounding."""
    return ranks.run(1, settled, spec)[0]


def assert_exact(ranks: Ranks, spec: JobSpec) -> None:
    check_job(spec)
    assert refusal(ATTENTION_RULES + EXPERT_RULES, Layout.of(spec.layout), spec) is None
    spec, account = expected(ranks, spec)
    verdict = compare(train(ranks, Trial(spec)), account, spec.model)
    assert verdict.exact, str(verdict)


_FEW_TOKENS = {"experts": 16, "top_k": 1, "router_normalize_top_k": False}  # some experts get none
_DROP_LIGHT, _DROP_LATE = {"capacity_factor": 1.0}, {"capacity_factor": 0.5, "drop_order": "position"}

# Experts over tensor, context and data parallel ranks, cut themselves, and copied over tensor parallel ranks.
DISPATCHED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("alltoall", _FEW_TOKENS, {"tp": 2, "ep": 2}),
    ("alltoall", _DROP_LATE, {"dp": 4, "ep": 2, "etp": 2}),
    ("allgather", {}, {"tp": 2}),
    ("allgather", _FEW_TOKENS, {"tp": 2, "ep": 2}),
    ("allgather", _DROP_LIGHT, {"dp": 4, "ep": 2, "etp": 2}),
]


@pytest.mark.parametrize(("dispatcher", "model", "layout"), DISPATCHED, ids=str)
def test_experts_are_reached_wherever_they_lie(
    ranks: Ranks, dispatcher: str, model: dict[str, Any], layout: dict[str, Any]
) -> None:
    assert_exact(ranks, job(model, {**layout, "dispatcher": dispatcher}))


@pytest.mark.parametrize(
    "model",
    [
        {"router_score": "sigmoid", **_BALANCED, **_SHARED, "router_scale": 2.5},
        {"router_score": "sigmoid", "router_normalize_top_k": False, "router_scale": 1.5},
        _BALANCED,
        {**_BALANCED, "router_normalize_top_k": False, "capacity_factor": 1.0, "aux_loss": 0.0},
    ],
    ids=str,
)
def test_routers_score_weigh_and_balance_as_the_reference(ranks: Ranks, model: dict[str, Any]) -> None:
    assert_exact(ranks, job(model, {"tp": 2, "dp": 2, "ep": 2}))


EVERY_MODULE = ("core_attn", "layernorm", "mlp", "moe", "shared_experts")


@pytest.mark.parametrize(
    ("recompute", "modules", "layout"),
    [
        ("full", (), {"tp": 2, "pp": 2, "ep": 2}),
        ("selective", EVERY_MODULE, {"tp": 2, "dp": 2, "etp": 2}),
        ("selective", tuple(module for module in EVERY_MODULE if module != "moe"), {"dp": 2, "ep": 2}),
    ],
)
def test_losses_and_loads_count_once_where_layers_are_computed_again(
    ranks: Ranks, recompute: str, modules: tuple[str, ...], layout: dict[str, Any]
) -> None:
    model = {**_BALANCED, **_SHARED, "first_dense_layers": 1, "capacity_factor": 1.0}
    assert_exact(ranks, job(model, {**layout, "recompute": recompute, "recompute_modules": modules}))


@pytest.mark.parametrize(
    "layout",
    [
        {"dp": 4, "ep": 2, "optimizer_replicas": 2},
        {"tp": 2, "dp": 2, "optimizer_replicas": 2},  # each weight on each rank, each expert on all
        {"pp": 2, "dp": 4, "optimizer_replicas": 4},
    ],
    ids=str,
)
def test_copies_of_sharded_optimizer_state_stay_alike(ranks: Ranks, layout: dict[str, Any]) -> None:
    assert_exact(ranks, job({}, layout))


def _leg(rank: int, spec: JobSpec, steps: range, load: Path | None, save: Path | None) -> Trained:
    """One rank's part of `steps`, validating on another batch after each."""
    layout = Layout.of(spec.layout)
    assert spec.layout.micro_batch is not None
    engine = build(spec, layout, torch.device("cpu"))
    if load:
        engine.load(load)
    at, losses, grad_norms = layout.coordinates(rank)["dp"], [], []
    for step in steps:
        mine, other = (
            micro_batches(global_batch(spec, index), at, layout.dp, spec.layout.micro_batch)
            for index in (step, step + 100)
        )
        result = engine.train_step(step, learning_rate(spec.train, step), mine)
        losses.append(result.loss)
        grad_norms.append(result.grad_norm)
        engine.evaluate(other)
    if save:
        engine.save(save)
    blocks = [Block(shard.name, shard.offset, shard.read().numpy()) for shard in engine.weights()]
    return Trained(losses, grad_norms, blocks)


def _legs(ranks: Ranks, first: JobSpec, second: JobSpec, folder: Path) -> Iterator[list[Trained]]:
    """Train half at one layout, and the rest from its checkpoint at another."""
    folder.mkdir()
    for spec, steps, load, save in (
        (first, range(1, HALF + 1), None, folder),
        (second, range(HALF + 1, STEPS + 1), folder, None),
    ):
        yield ranks.run(Layout.of(spec.layout).world, _leg, spec, steps, load, save)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"dp": 4, "ep": 2, "optimizer_replicas": 2}, {"tp": 2, "dp": 2, "ep": 2}),
        ({"dp": 2, "ep": 2}, {"dp": 4, "optimizer_replicas": 4}),
        ({"dp": 2, "pp": 2, "ep": 2, "stage_layers": (1, 3)}, {"pp": 3, "stage_layers": (2, 1, 1)}),
    ],
    ids=str,
)
def test_optimizer_state_and_biases_change_layout(
    ranks: Ranks, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    model = {**_BALANCED, "router_score": "sigmoid", "layers": 4}
    spec, account = expected(ranks, job(model, first))
    other = spec.model_copy(update={"layout": job(model, second).layout})
    early, late = _legs(ranks, spec, other, tmp_path / "half")
    whole = Trained(
        early[0].losses + late[0].losses,
        early[0].grad_norms + late[0].grad_norms,
        [block for rank in late for block in rank.blocks],
    )
    verdict = compare(whole, account, spec.model)
    assert verdict.exact, str(verdict)


def test_biases_resume_bit_equal(ranks: Ranks, tmp_path: Path) -> None:
    spec = job(_BALANCED, {"tp": 2, "ep": 2, "recompute": "full"})
    undisturbed = ranks.run(2, _leg, spec, range(1, STEPS + 1), None, None)
    _, resumed = _legs(ranks, spec, spec, tmp_path / "half")
    for one, other in zip(undisturbed, resumed, strict=True):
        assert one.losses[HALF:] == other.losses
        biases = [block for block in one.blocks if block.name.endswith("router.bias")]
        assert len(biases) == 2
        assert all(block.values.any() for block in biases)
        for block, found in zip(one.blocks, other.blocks, strict=True):
            np.testing.assert_array_equal(found.values, block.values, err_msg=block.name)


def test_biases_are_no_parameters(ranks: Ranks) -> None:
    spec = job(_BALANCED, {"dp": 2, "ep": 2})
    assert ranks.run(2, _parameters, spec) == [spec.model.parameters] * 2


def _parameters(rank: int, spec: JobSpec) -> int:
    return build(spec, Layout.of(spec.layout), torch.device("cpu")).parameters


def test_a_node_without_deepep_says_so_before_anything_starts() -> None:
    spec = job({}, {"dp": 2, "ep": 2, "dispatcher": "flex"})
    with pytest.raises(InputError, match=r"DeepEP .* is not installed here; nearest valid: alltoall"):
        build(spec, Layout.of(spec.layout), torch.device("cuda", 0))
