"""The harness itself: what it trains on, what it calls exact, and that it sees what is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs.architecture import ModelArchitecture
from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.exactness.oracle import NEAR_TIE, Account, oracle, settled
from orchestrator.worker.exactness.trial import Block, Trained
from orchestrator.worker.exactness.verdict import compare

MODEL = ModelArchitecture(
    name="tiny", layers=2, hidden=16, heads=4, kv_heads=2, head_dim=4, ffn=0, vocab=32, init_std=0.1,
    experts=4, top_k=2, expert_ffn=8, aux_loss=0.05,
)  # fmt: skip


def job(model: ModelArchitecture = MODEL, *, packing: bool = False, steps: int = 20, **train: float) -> JobSpec:
    one = dict.fromkeys(("tp", "cp", "pp", "vpp", "dp", "ep", "etp", "micro_batch"), 1)
    given = {"seed": 1, "learning_rate": 3e-3, "adam_epsilon": 1e-6} | train
    return JobSpec(
        name="tiny",
        model=model,
        data=DataSpec(files=("unused",), packing=packing),
        cluster=ClusterSpec(name="test", device="cpu", hardware="laptop_cpu", devices_per_node=1),
        layout=LayoutSpec(**one),
        train=TrainSpec(steps=steps, sequence_length=8, global_batch=4, precision="fp32", **given),
        checkpoint=CheckpointSpec(interval=1),
        policy=PolicySpec(),
    )


@pytest.fixture(scope="module")
def account() -> Account:
    return oracle(job())


def as_trained(account: Account) -> Trained:
    blocks = [Block(name, (0,) * whole.ndim, whole.copy()) for name, whole in account.weights.items()]
    return Trained(list(account.losses), list(account.grad_norms), blocks)


def test_a_batch_depends_on_seed_and_step_alone_and_counts_rows_unevenly() -> None:
    first, again, other = global_batch(job(), 1), global_batch(job(), 1), global_batch(job(), 2)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != other.tokens).any()
    np.testing.assert_array_equal(first.tokens[:, 1:], first.labels[:, :-1])
    assert first.loss_mask[-1].all()
    assert not first.loss_mask[0].all()
    assert first.documents is None


def test_documents_ascend_begin_differently_and_are_cut_unevenly() -> None:
    rows = [global_batch(job(packing=True), step) for step in range(1, 20)]
    for batch in rows:
        assert batch.documents is not None
        steps = np.diff(batch.documents, axis=1)
        assert set(np.unique(steps)) <= {0, 1}
        begins = np.pad(steps, ((0, 0), (1, 0)), constant_values=1) == 1
        assert begins.sum() <= 16
        assert len(set(batch.tokens[:, 0])) == len(batch.tokens)
    assert {int(batch.documents.max()) for batch in rows if batch.documents is not None} >= {2, 3}


def test_ranks_take_the_rows_of_a_global_batch_in_the_order_of_the_training_loop() -> None:
    whole = global_batch(job(packing=True), 1)
    whole = replace(whole, tokens=np.arange(8)[:, None], labels=whole.labels, loss_mask=whole.loss_mask)
    shares = [[batch.tokens[:, 0].tolist() for batch in micro_batches(whole, rank, 2, 2)] for rank in range(2)]
    assert shares == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_the_same_training_is_exact_and_its_rounding_is_within_the_bars(account: Account) -> None:
    assert compare(as_trained(account), account, MODEL).exact
    rounded = compare(as_trained(oracle(job(), torch.float32)), account, MODEL)
    assert rounded.exact
    assert 0 < rounded.losses.largest < 1e-6


@pytest.mark.parametrize(
    "otherwise",
    [
        {"adam_beta2": 0.96},
        {"weight_decay": 0.11},
        {"clip_grad_norm": 0},
        {"adam_epsilon": 2e-6},
        {"learning_rate": 3.01e-3},
    ],
    ids=str,
)
def test_another_training_is_not_exact(account: Account, otherwise: dict[str, float]) -> None:
    assert not compare(as_trained(oracle(job(**otherwise))), account, MODEL).exact


def test_a_balancing_loss_that_is_a_hundredth_too_large_is_not_exact(account: Account) -> None:
    other = MODEL.model_copy(update={"aux_loss": 0.0505})
    verdict = compare(as_trained(oracle(job(other))), account, MODEL)
    assert not verdict.exact
    assert "EXCEEDED" in str(verdict)


def test_the_worst_step_and_tensor_are_named(account: Account) -> None:
    trained = as_trained(account)
    trained.losses[1] *= 1 + 3e-5
    trained.grad_norms[2] = float("nan")
    name = "layers.1.moe.experts.3.up.weight"
    blocks = [
        replace(block, values=block.values * (1 + (2e-4 if block.name == name else 0))) for block in trained.blocks
    ]
    verdict = compare(replace(trained, blocks=blocks), account, MODEL)
    assert (verdict.losses.where, verdict.losses.largest) == ("step 2", pytest.approx(3e-5))
    assert (verdict.grad_norms.where, verdict.grad_norms.holds) == ("step 3", False)
    assert (verdict.weights.where, verdict.weights.largest) == (name, pytest.approx(2e-4))


def test_a_replica_that_went_its_own_way_is_seen(account: Account) -> None:
    trained = as_trained(account)
    norm = next(block for block in trained.blocks if block.name == "norm.weight")
    stray = replace(norm, values=norm.values * 1.001)
    for blocks in ([*trained.blocks, stray], [stray, *trained.blocks]):
        verdict = compare(replace(trained, blocks=blocks), account, MODEL)
        assert verdict.weights.where == "norm.weight"
        assert not verdict.exact


def test_weights_that_ranks_do_not_hold_or_the_model_has_not_are_told(account: Account) -> None:
    trained = as_trained(account)
    with pytest.raises(ValueError, match=r"ranks hold 0 elements of embedding\.weight, which has 512"):
        compare(replace(trained, blocks=trained.blocks[1:]), account, MODEL)
    with pytest.raises(ValueError, match="ranks hold tensors that the model has not: extra"):
        compare(replace(trained, blocks=[*trained.blocks, Block("extra", (0,), np.ones(1))]), account, MODEL)


def test_a_near_tie_is_seen_and_another_seed_taken() -> None:
    plain = job(steps=1)
    # Without attention's and experts' share, and with so small a router, all scores are nearly equal.
    tied = plain.model_copy(update={"model": MODEL.model_copy(update={"init_std": 1e-7})})
    assert oracle(tied).narrowest_choice < NEAR_TIE < oracle(plain).narrowest_choice
    found, account = settled(0, plain)
    assert found == plain
    assert account.narrowest_choice == oracle(plain).narrowest_choice
    wide, _ = settled(0, tied)
    assert wide.train.seed != tied.train.seed


def test_the_narrowest_choice_of_who_is_dropped_counts() -> None:
    dropping = MODEL.model_copy(update={"capacity_factor": 0.5})
    by_position = dropping.model_copy(update={"drop_order": "position"})
    choices = [oracle(job(model, seed=2)).narrowest_choice for model in (dropping, by_position)]
    assert choices[0] < choices[1]


def test_a_bias_of_routers_is_an_account_of_weights_too() -> None:
    model = MODEL.model_copy(update={"router_score": "sigmoid", "router_bias": True})
    account = oracle(job(model))
    bias = account.weights["layers.0.moe.router.bias"]
    np.testing.assert_allclose(np.abs(bias / model.router_bias_rate) % 1, 0, atol=1e-9)
    assert bias.any()
