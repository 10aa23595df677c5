"""Experts that ranks share, in the Megatron engine: the run is the reference model's, whatever is copied and moved."""

from __future__ import annotations

from typing import Any

import pytest
from small_jobs import small_job, small_model

from jobs.spec import JobSpec
from orchestrator.worker.exactness.oracle import settled
from orchestrator.worker.exactness.trial import Trial, train
from orchestrator.worker.exactness.verdict import compare
from orchestrator.worker.ranks import Ranks

STEPS = 4


def job(model: dict[str, Any], layout: dict[str, Any]) -> JobSpec:
    shared = {"expert_parallelism": "fssdp", "expert_copies": 2}
    return small_job(small_model("mixtral", **model), {**shared, **layout}, steps=STEPS, adam_epsilon=1e-6)


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
    {"dp": 4, "ep": 4, "recompute": "selective", "recompute_modules": ("core_attn", "moe")},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_is_that_of_the_reference(ranks: Ranks, layout: dict[str, Any]) -> None:
    assert_exact(ranks, job({"experts": 8, "layers": 4, "aux_loss": 0.0}, layout))
