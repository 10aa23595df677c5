"""One job, many layouts, one result: the engine against itself on a single rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_jobs import small_job, small_model

from jobs.spec import JobSpec
from orchestrator.worker.engines.megatron import build
from orchestrator.worker.engines.protocol import Batch
from orchestrator.worker.ranks import Ranks
from parallel.layout import Layout

STEPS, HALF = 8, 4
SEQUENCE, GLOBAL_BATCH = 16, 8

MODELS = {kind: small_model(kind) for kind in ("dense", "mixtral", "qwen")}


def job(model: str, precision: str = "fp32") -> JobSpec:
    return small_job(MODELS[model], {"micro_batch": None}, checkpoint_interval=HALF, steps=STEPS, precision=precision)


def batches(step: int, layout: Layout, rank: int, micro_batch: int) -> list[Batch]:
    """This rank's share of a global batch that depends on the step alone; labels are counted unevenly."""
    draw = np.random.default_rng(step)
    text = draw.integers(0, MODELS["dense"].vocab, (GLOBAL_BATCH, SEQUENCE + 1))
    mask = (draw.random((GLOBAL_BATCH, SEQUENCE)) < np.linspace(0.3, 1, GLOBAL_BATCH)[:, None]).astype(np.float32)
    mine = np.arange(GLOBAL_BATCH)[layout.coordinates(rank)["dp"] :: layout.dp]
    return [Batch(text[rows, :-1], text[rows, 1:], mask[rows]) for rows in mine.reshape(-1, micro_batch)]


@dataclass(frozen=True)
class Run:
    """What to do on every rank: load, train `steps` (saving at `save_at`), and evaluate."""

    job: JobSpec
    layout: Layout
    steps: range
    micro_batch: int = 2
    load: Path | None = None
    save_at: dict[int, Path] | None = None

    def __call__(self, rank: int) -> dict[str, Any]:
        engine = build(self.job, self.layout, torch.device("cpu"))
        if self.load:
            engine.load(self.load)
        curve = []
        for step in self.steps:
            self._save(engine, step - 1)
            done = engine.train_step(step, 1e-2 / step, batches(step, self.layout, rank, self.micro_batch))
            curve.append((done.loss, done.grad_norm))
        self._save(engine, self.steps[-1])
        validation = engine.evaluate(batches(0, self.layout, rank, self.micro_batch))
        return {"curve": curve, "validation": validation, "parameters": engine.parameters}

    def _save(self, engine: Any, step: int) -> None:
        if self.save_at and step in self.save_at:
            engine.save(self.save_at[step])


def start(ranks: Ranks, run: Run) -> dict[str, Any]:
    """Rank 0's account, once all ranks are seen to give the same one."""
    accounts = ranks.run(run.layout.world, _call, run)
    assert all(account == accounts[0] for account in accounts)
    return accounts[0]


def _call(rank: int, run: Run) -> dict[str, Any]:
    return run(rank)


def folder(parent: Path, name: str) -> Path:
    made = parent / name
    made.mkdir()
    return made


@dataclass(frozen=True)
class Reference:
    account: dict[str, Any]
    fresh: Path
    halfway: Path


@pytest.fixture(scope="module")
def reference(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An undisturbed run on one rank, whole batches at once, with checkpoints before the first step and halfway."""
    known: dict[str, Reference] = {}

    def of(model: str) -> Reference:
        if model not in known:
            parent = tmp_path_factory.mktemp(model)
            fresh, halfway = folder(parent, "fresh"), folder(parent, "halfway")
            saves = {0: fresh, HALF: halfway}
            run = Run(job(model), Layout(), range(1, STEPS + 1), micro_batch=GLOBAL_BATCH, save_at=saves)
            known[model] = Reference(start(ranks, run), fresh, halfway)
        return known[model]

    return of


def assert_same_training(found: dict[str, Any], expected: dict[str, Any], steps: slice = slice(None)) -> None:
    np.testing.assert_allclose(found["curve"], expected["curve"][steps], rtol=1e-5)
    np.testing.assert_allclose(found["validation"], expected["validation"], rtol=1e-5)
    assert found["parameters"] == expected["parameters"]


LAYOUTS = [
    ("mixtral", Layout(tp=2)),  # experts replicated over TP, then sharded over ranks that TP is not
    ("mixtral", Layout(dp=4, ep=2, etp=2)),
    ("mixtral", Layout(tp=2, dp=2, pp=2, ep=2)),
    ("qwen", Layout(tp=2, dp=2, etp=2)),
]


@pytest.mark.parametrize(("model", "layout"), LAYOUTS, ids=lambda value: getattr(value, "label", value))
def test_training_is_the_same_at_every_layout(ranks: Ranks, reference: Any, model: str, layout: Layout) -> None:
    whole = reference(model)
    run = Run(job(model), layout, range(1, STEPS + 1), load=whole.fresh)
    assert_same_training(start(ranks, run), whole.account)


def test_weights_are_drawn_alike_at_every_layout(ranks: Ranks, reference: Any) -> None:
    for model, layout in (("qwen", Layout(tp=2, pp=2, ep=2)), ("mixtral", Layout(dp=4, ep=2, etp=2))):
        first = start(ranks, Run(job(model), layout, range(1, 2)))
        np.testing.assert_allclose(first["curve"], reference(model).account["curve"][:1], rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "layout"),
    [("qwen", Layout(tp=2, pp=2, ep=2)), ("mixtral", Layout(dp=4, ep=2, etp=2)), ("mixtral", Layout(tp=2, dp=2))],
    ids=lambda value: getattr(value, "label", value),
)
def test_a_checkpoint_resumes_at_another_layout(
    ranks: Ranks, reference: Any, tmp_path: Path, model: str, layout: Layout
) -> None:
    whole = reference(model)
    second_half = range(HALF + 1, STEPS + 1)
    # From one rank to many, which save in their turn, and back to one.
    halfway = folder(tmp_path, "halfway")
    spread = start(ranks, Run(job(model), layout, second_half, load=whole.halfway, save_at={HALF: halfway}))
    assert_same_training(spread, whole.account, slice(HALF, None))
    gathered = start(ranks, Run(job(model), Layout(), second_half, load=halfway))
    assert_same_training(gathered, whole.account, slice(HALF, None))


def test_a_checkpoint_resumes_bit_equal_at_the_same_layout(ranks: Ranks, tmp_path: Path) -> None:
    for precision, layout in (("fp32", Layout(tp=2, dp=2, ep=2)), ("bf16", Layout(dp=2))):
        spec, saved = job("mixtral", precision), folder(tmp_path, precision)
        undisturbed = start(ranks, Run(spec, layout, range(1, STEPS + 1), save_at={HALF: saved}))
        resumed = start(ranks, Run(spec, layout, range(HALF + 1, STEPS + 1), load=saved))
        assert resumed["curve"] == undisturbed["curve"][HALF:]
        assert resumed["validation"] == undisturbed["validation"]


@dataclass(frozen=True)
class Memorise:
    """Train on one batch again and again, with a validation of another between steps if `interrupted`."""

    job: JobSpec
    layout: Layout
    steps: int
    interrupted: bool = False

    def __call__(self, rank: int) -> list[float]:
        engine = build(self.job, self.layout, torch.device("cpu"))
        losses = []
        for step in range(1, self.steps + 1):
            losses.append(engine.train_step(step, 1e-2, batches(1, self.layout, rank, 2)).loss)
            if self.interrupted:
                engine.evaluate(batches(2, self.layout, rank, 2))
        return losses


def test_bf16_trains_as_fp32_does(ranks: Ranks) -> None:
    runs = [Memorise(job("mixtral", precision), Layout(tp=2, dp=2, ep=2), 12) for precision in ("fp32", "bf16")]
    full, half = (ranks.run(4, _call, run)[0] for run in runs)
    assert full[-1] < 0.5 * full[0]
    np.testing.assert_allclose(half, full, atol=0.05)


def test_evaluation_leaves_training_as_it_was(ranks: Ranks) -> None:
    runs = [Memorise(job("mixtral"), Layout(dp=2, ep=2), 3, interrupted) for interrupted in (False, True)]
    plain, interrupted = (ranks.run(2, _call, run)[0] for run in runs)
    assert interrupted == plain


def test_parameters_are_those_of_the_architecture(reference: Any) -> None:
    hidden, ffn, vocab, expert_ffn = 32, 48, 64, 24
    attention = hidden * (4 + 2 + 2) * 8 + 4 * 8 * hidden
    norms, swiglu = 2 * hidden, 3 * hidden * ffn
    experts = 4 * hidden + 4 * 3 * hidden * expert_ffn
    ends = 2 * vocab * hidden + hidden
    assert reference("dense").account["parameters"] == ends + 2 * (attention + norms + swiglu)
    assert reference("mixtral").account["parameters"] == ends + 2 * (attention + norms + experts)
    biases_and_head_norms = (4 + 2 + 2) * 8 + 2 * 8
    shared = 3 * hidden * 40 + hidden
    tied = vocab * hidden + hidden
    layers = 2 * (attention + biases_and_head_norms + norms) + swiglu + experts + shared
    assert reference("qwen").account["parameters"] == tied + layers


def test_a_failing_rank_is_reported_and_ends_the_others(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed:.*ZeroDivisionError"):
        ranks.run(2, _fail_on_rank_one)


def _fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise ZeroDivisionError
    torch.distributed.barrier()
