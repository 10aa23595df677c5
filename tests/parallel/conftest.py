"""Jobs for the planner's tests, from the shipped models and clusters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.architecture import ModelArchitecture
from jobs.spec import CheckpointSpec, ClusterSpec, DataSpec, JobSpec, LayoutSpec, PolicySpec, TrainSpec

CONF = Path(__file__).parents[2] / "jobs" / "conf"

MakeJob = Callable[..., JobSpec]


@pytest.fixture(scope="session")
def make_job() -> MakeJob:
    """`make_job(model, cluster, layout, sequence_length=..., model_changes={...}, cluster_changes={...}, ...)`."""

    def make(
        model: str = "quickstart",
        cluster: str = "laptop",
        layout: dict[str, int] | None = None,
        *,
        engine: str = "megatron",
        sequence_length: int = 4096,
        global_batch: int = 32,
        precision: str = "bf16",
        model_changes: dict[str, Any] | None = None,
        **cluster_changes: Any,
    ) -> JobSpec:
        def shipped(group: str, name: str) -> dict[str, Any]:
            fields: dict[str, Any] = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
            return fields

        return JobSpec(
            name="test",
            engine=engine,
            model=ModelArchitecture(**shipped("model", model) | (model_changes or {})),
            data=DataSpec(files=("stdlib:**/*.py",)),
            cluster=ClusterSpec(**shipped("cluster", cluster) | cluster_changes),
            layout=LayoutSpec(**(layout or {})),
            train=TrainSpec(
                steps=1,
                sequence_length=sequence_length,
                global_batch=global_batch,
                precision=precision,
                learning_rate=1e-3,
            ),
            checkpoint=CheckpointSpec(interval=1),
            policy=PolicySpec(),
        )

    return make
