"""What a rank tells of its experts' load: over all ranks, each routed token once for each expert that it chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_jobs import small_job, small_model

from jobs.spec import JobSpec
from orchestrator.worker.exactness.batches import global_batch, micro_batches
from orchestrator.worker.main import import_engine
from orchestrator.worker.ranks import Ranks
from parallel.layout import Layout


def _rows(rank: int, spec: JobSpec) -> int | None:
    layout = Layout.of(spec.layout)
    engine = import_engine(spec.engine, "cpu").build(spec, layout, torch.device("cpu"))
    assert spec.layout.micro_batch is not None
    batches = micro_batches(global_batch(spec, 1), layout.coordinates(rank)["dp"], layout.dp, spec.layout.micro_batch)
    engine.evaluate(batches)
    return engine.train_step(1, 1e-3, batches).routed_rows


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_the_rows_of_all_ranks_are_the_choices_of_all_tokens(ranks: Ranks, engine: str) -> None:
    layout: dict[str, Any] = {"dp": 2, "ep": 2} | ({"zero_stage": 1} if engine == "deepspeed" else {})
    spec = small_job(small_model("mixtral"), layout, engine=engine, steps=1)
    found = ranks.run(2, _rows, spec)
    choices = spec.train.global_batch * spec.train.sequence_length * spec.model.top_k * spec.model.layers
    assert sum(found) == choices
    assert len(set(found)) == 2


def test_a_dense_model_has_none(ranks: Ranks) -> None:
    assert ranks.run(1, _rows, small_job(small_model("dense"), {}, steps=1)) == [None]
