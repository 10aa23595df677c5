"""The tables that verbs print."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from sample_runs import job, make_checkpoint, make_run

from orchestrator import manifests
from orchestrator.control import plan_tables, tables
from orchestrator.control.record import status_of
from parallel.layout import Layout
from parallel.planning.planner import plan_job


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    ages: list[tuple[str, float, str]] = [("a", 3, "3 s"), ("b", 150, "2 min"), ("c", 7300, "2 h"), ("d", 2e5, "2 d")]
    statuses = [
        status_of(make_run(str(tmp_path / name), updated_at=now - age, attempt=number))
        for number, (name, age, _) in enumerate(ages)
    ]
    tables.runs(statuses, "runs")
    lines = printed(capsys)
    assert lines[0] == "run  state  attempt  step  layout         updated"
    assert lines[1:] == [
        f"{name}    done         {number}   100  tp2 dp2 ep2  {ago + ' ago':>9}".rstrip()
        for number, (name, _, ago) in enumerate(ages)
    ]
    tables.runs([], "runs")
    assert printed(capsys) == ["no runs under runs"]


def test_status(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {
        "run_id": "quick-1",
        "state": "failed",
        "reason": "rank 1 was ended by SIGKILL",
        "attempt": 2,
        "step": 20,
        "steps": 100,
        "layout": Layout(tp=2, dp=2).as_dict(),
        "ledger": {"productive": 10.04, "queue": 0.5},
        "overall": {"goodput": 0.9526, "tokens_per_second": 20.0},
        "run_folder": "/runs/quick-1",
        "ranks": [
            {"rank": 0, "pid": 4711, "node": "host-0", "state": "left", "step": 20},
            {"rank": 10, "pid": None, "node": "host-1", "state": "starting", "step": 0},
        ],
    }
    tables.status(found)
    assert printed(capsys) == [
        "quick-1  failed: rank 1 was ended by SIGKILL",
        "attempt 2, step 20 of 100, layout tp2 dp2",
        "seconds productive 10.0  queue 0.5",
        "goodput 95.3%, 20 tokens/s over all its time",
        "folder  /runs/quick-1",
        "",
        "rank   pid  node    state     step",
        "   0  4711  host-0  left        20",
        "  10     -  host-1  starting     0",
    ]
    tables.status(found | {"reason": None, "ranks": []})
    assert printed(capsys)[0] == "quick-1  failed"


def test_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    run = make_run(str(tmp_path / "quick-1"))
    tables.checkpoints(run, {})
    assert printed(capsys) == ["quick-1 has no checkpoint"]
    make_checkpoint(run, 20)
    tables.checkpoints(run, manifests.found(run))
    assert printed(capsys) == [
        "step  layout       size  files  written",
        "  20  tp2 dp2 ep2  0 MB      2  1970-01-12 13:47:00",
    ]


def test_planning(capsys: pytest.CaptureFixture[str]) -> None:
    spec = job("layout=auto", "cluster=h200_x8", "model=mixtral_8x7b", "train=pretrain")
    found = plan_job(spec)
    plan_tables.planning(spec, found, 2, None, 0)
    lines = printed(capsys)
    assert lines[0] == "quickstart on 1 x 8 h200, bf16"
    assert lines[1] == (
        f"{found.considered} candidates, {len(found.plans)} fit; the first is what `run` and `submit` take"
    )
    assert lines[3].split() == [
        "layout",
        "micro-batch",
        "count",
        "step",
        "nine",
        "of",
        "ten",
        "tokens/s",
        "MFU",
        "memory",
    ]
    for line, plan in zip(lines[4:6], found.plans, strict=False):
        assert plan.layout.label in line
        assert plan.mfu is not None
        assert f"{plan.tokens_per_second:,.0f}  {plan.mfu:.1%}" in line
    reasons = lines[lines.index("left out  because, for example") + 1 :]
    assert [line.split(maxsplit=1) for line in reasons] == [
        [str(each.count), each.example] for each in found.rejections
    ]
