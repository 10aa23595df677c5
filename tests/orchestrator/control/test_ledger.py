"""Every second of a run under one heading, whatever happens to the run."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.ledger import HEADINGS, Ledger


def test_a_run_that_loses_a_rank() -> None:
    ledger = Ledger(start=100)
    ledger.switch("restart", 103)  # devices granted, ranks start
    ledger.switch("productive", 110)
    ledger.step(1, 112, stall_seconds=0.5)
    ledger.step(2, 114, stall_seconds=0)
    ledger.switch("detect", 115)  # a rank died one second into step 3
    ledger.switch("restart", 116)
    ledger.switch("productive", 120)
    ledger.step(2, 122, stall_seconds=0.25)  # from the checkpoint of step 1
    ledger.step(3, 124, stall_seconds=0)
    ledger.pause(125)
    assert ledger.totals(1000) == {
        "productive": 1.5 + 2 + 2 + 1,
        "rework": 1 + 1.75,
        "stall": 0.75,
        "detect": 1,
        "restart": 7 + 4,
        "queue": 3,
    }


def test_totals_count_the_open_interval() -> None:
    ledger = Ledger(start=10)
    assert ledger.totals(14)["queue"] == 4
    ledger.switch("productive", 15)
    assert (ledger.totals(18)["queue"], ledger.totals(18)["productive"]) == (5, 3)


def test_a_crashed_controller_costs_a_restart_and_a_paused_one_nothing() -> None:
    ledger = Ledger(start=0)
    ledger.switch("productive", 1)
    ledger.step(1, 3, stall_seconds=0)
    crashed = Ledger.resumed(json.loads(json.dumps(ledger.as_dict())), at=10)
    assert crashed.totals(12) == {**ledger.totals(3), "restart": 7 + 2}
    ledger.pause(4)
    paused = Ledger.resumed(json.loads(json.dumps(ledger.as_dict())), at=10)
    assert paused.totals(12) == {**ledger.totals(4), "restart": 2}
    paused.switch("productive", 12)
    paused.step(1, 13, stall_seconds=0)
    assert paused.totals(13)["rework"] == 1  # it remembers the highest step


def test_a_stall_is_no_longer_than_its_step() -> None:
    ledger = Ledger(start=0)
    ledger.step(1, 2, stall_seconds=5)
    assert (ledger.totals(2)["stall"], ledger.totals(2)["productive"]) == (2, 0)


def test_a_paused_ledger_books_nothing() -> None:
    ledger = Ledger(start=0)
    ledger.pause(1)
    with pytest.raises(ValueError, match="paused"):
        ledger.switch("productive", 2)


switches = st.tuples(st.just("switch"), st.sampled_from(HEADINGS))
steps = st.tuples(st.just("step"), st.tuples(st.integers(1, 6), st.floats(-1, 20)))
others = st.tuples(st.sampled_from(["pause", "save"]), st.none())


@given(st.floats(0, 2e9), st.lists(st.tuples(st.floats(-1, 10), switches | steps | others), max_size=30))
def test_headings_sum_to_the_time_the_run_was_active(
    start: float, events: list[tuple[float, tuple[str, object]]]
) -> None:
    ledger, now, latest, active = Ledger(start), start, start, 0.0
    paused = False
    for passed, (kind, argument) in events:
        now += passed  # a clock may be set back
        if paused:
            ledger, paused, latest = Ledger.resumed(json.loads(json.dumps(ledger.as_dict())), now), False, now
        active, latest = active + max(now - latest, 0), max(now, latest)
        if kind == "switch":
            ledger.switch(argument, now)
        elif kind == "step":
            step, stall = argument
            ledger.step(step, now, stall)
        elif kind == "pause":
            ledger.pause(now)
            paused = True
        else:  # the controller died, and another took over at once
            ledger = Ledger.resumed(json.loads(json.dumps(ledger.as_dict())), now)
        totals = ledger.totals(now)
        assert set(totals) == set(HEADINGS)
        assert min(totals.values()) >= 0
        assert sum(totals.values()) == pytest.approx(active, abs=1e-4)


def test_tokens_count_once_however_often_they_are_trained() -> None:
    ledger = Ledger(start=0)
    for step in (1, 2, 2, 3):
        ledger.step(step, 2.0 * step, 0, tokens=100)
    assert ledger.tokens == 300
    again = Ledger.resumed(json.loads(json.dumps(ledger.as_dict())), at=10)
    again.step(3, 11, 0, tokens=100)
    assert again.tokens == 300
