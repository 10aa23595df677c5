from __future__ import annotations

from pathlib import Path

import pytest
from sample_runs import job
from stage import Clock, SetUp, Stage, Turn

from jobs.spec import JobSpec
from orchestrator.control import controller as module


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetUp:
    """`stage(turn, turn, ..., spec=...)`"""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)

    def set_up(*turns: Turn, spec: JobSpec | None = None) -> Stage:
        return Stage(str(tmp_path / "run-1"), clock, spec or job("train.steps=2"), *turns)

    return set_up
