from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from commands import Answered, Fivefold
from sample_runs import event_line, make_checkpoint, make_run, metrics_line

from orchestrator import cli
from orchestrator.run_folder import RunFolder


@pytest.fixture(params=["disk", "object store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty run root on a disk, and one at a URL of a filesystem that is not the local one."""
    if request.param == "disk":
        yield str(tmp_path / "runs")
        return
    place = f"/runs-{secrets.token_hex(4)}"
    yield f"memory:/{place}"
    memory = fsspec.filesystem("memory")
    if memory.exists(place):
        memory.rm(place, recursive=True)


@pytest.fixture
def run_root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def fivefold(run_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fivefold:
    """`fivefold("status", "quick-1")`, on a machine without GPUs or a Ray cluster."""
    monkeypatch.setenv("FIVEFOLD_RUN_ROOT", str(run_root))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def call(*arguments: str) -> Answered:
        code = cli.run(arguments)
        out, err = capsys.readouterr()
        return Answered(code, out, err)

    return call


@pytest.fixture
def run(run_root: Path) -> RunFolder:
    """A run that was interrupted at step 40, with checkpoints at 20 and 40."""
    made = make_run(str(run_root / "quick-1"), state="interrupted", reason="interrupted at step 40", step=40)
    for step in (20, 40):
        make_checkpoint(made, step)
    made.append("metrics.jsonl", [metrics_line(step) for step in (39, 40)])
    made.append("events.jsonl", [event_line("stopping", "interrupted at step 40: writing a checkpoint, then leaving")])
    made.write_json("ledger.json", {"totals": {"productive": 20.0}})
    made.write("logs/attempt-1/rank-1.log", b"hello\nfrom rank 1\n")
    return made
