"""Offload to NVMe, where DeepSpeed's operations for it are built: to a folder, whatever disk that is on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from jobs.architecture import ModelArchitecture
from jobs.errors import InputError
from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec
from orchestrator.nvme import check_nvme
from orchestrator.worker.engines.deepspeed import build
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.exactness.oracle import settled
from orchestrator.worker.exactness.trial import Trial, train
from orchestrator.worker.exactness.verdict import compare
from orchestrator.worker.ranks import Ranks
from orchestrator.worker.schedule import learning_rate
from parallel.layout import Layout


def _not_built() -> str:
    try:
        check_nvme(LayoutSpec(zero_stage=3, offload_optimizer="nvme", nvme_folder="/"))
    except InputError as refused:
        return str(refused)
    return ""


# DeepSpeed's operation for files wants libaio's headers and a compiler, which this project does not: where it is not
# built, jobs that ask for it are refused with the same words (tests/orchestrator/test_nvme.py), and training with it
# cannot be tried. The words say how it is built; run these before a release in an environment that has it.
pytestmark = pytest.mark.skipif(bool(_not_built()), reason=_not_built())

STEPS, HALF = 4, 2

# Half of a projection, a rank's part, is a megabyte in bf16: DeepSpeed leaves in memory what is less.
MODEL = ModelArchitecture(
    name="wide", layers=2, hidden=512, heads=8, kv_heads=4, head_dim=64, ffn=2048, vocab=64, init_std=0.02,
    experts=2, top_k=1, expert_ffn=2048, aux_loss=0.05,
)  # fmt: skip
TRAIN: dict[str, Any] = {"steps": STEPS, "sequence_length": 16, "global_batch": 8, "learning_rate": 1e-3}
EVERYTHING = {"offload_optimizer": "nvme", "offload_parameters": "nvme"}


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobSpec]:
    def make(precision: Literal["fp32", "bf16"], **offload: str) -> JobSpec:
        layout: dict[str, Any] = {"dp": 2, "micro_batch": 2, "zero_stage": 3, "nvme_folder": str(tmp_path), **offload}
        return JobSpec(
            name="wide",
            engine="deepspeed",
            model=MODEL,
            data=DataSpec(files=("unused",)),
            cluster=ClusterSpec(name="test", device="cpu", hardware="laptop", devices_per_node=8),
            layout=LayoutSpec(**layout),
            train=TrainSpec(**TRAIN, precision=precision),
            checkpoint=CheckpointSpec(interval=HALF),
            policy=PolicySpec(),
        )

    return make


@dataclass(frozen=True)
class Run:
    """Steps to train on every rank, from a checkpoint or from the beginning, and a folder to save after HALF to."""

    job: JobSpec
    steps: range
    load: Path | None = None
    save: Path | None = None


def curve(ranks: Ranks, run: Run) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return ranks.run(Layout.of(run.job.layout).world, _train, run, seconds=170)[0]  # type: ignore[no-any-return]


def _train(rank: int, run: Run) -> list[tuple[float, float]]:
    job, layout = run.job, Layout.of(run.job.layout)
    engine = build(job, layout, torch.device("cpu"))
    if run.load:
        engine.load(run.load)
    found = []
    for step in run.steps:
        mine = micro_batches(global_batch(job, step), layout.coordinates(rank)["dp"], layout.dp, 2)
        result = engine.train_step(step, learning_rate(job.train, step), mine)
        found.append((result.loss, result.grad_norm))
        if step == HALF and run.save:
            engine.save(run.save)
    return found


def written(folder: Path) -> int:
    """Bytes under a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_moments_on_nvme_train_as_the_oracle_does(ranks: Ranks, job: Any, tmp_path: Path) -> None:
    (found,) = ranks.run(1, settled, job("fp32", offload_optimizer="nvme"), seconds=170)
    case, account = found
    verdict = compare(train(ranks, Trial(case), seconds=170), account, MODEL)
    assert verdict.exact, verdict
    assert written(tmp_path) > 2 * 4 * MODEL.parameters  # at least both moments, in fp32


def test_weights_on_nvme_train_as_those_in_memory_do(ranks: Ranks, job: Any, tmp_path: Path) -> None:
    in_memory = curve(ranks, Run(job("bf16", offload_parameters="cpu"), range(1, STEPS + 1)))
    assert written(tmp_path) == 0
    assert curve(ranks, Run(job("bf16", offload_parameters="nvme"), range(1, STEPS + 1))) == in_memory
    assert written(tmp_path) > MODEL.parameters  # of two bytes each, most of them


def test_a_checkpoint_resumes_bit_equal(ranks: Ranks, job: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    saved = tmp_path_factory.mktemp("saved")
    case = job("bf16", **EVERYTHING)
    undisturbed = curve(ranks, Run(case, range(1, STEPS + 1), save=saved))
    assert curve(ranks, Run(case, range(HALF + 1, STEPS + 1), load=saved)) == undisturbed[HALF:]
