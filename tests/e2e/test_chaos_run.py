"""`fivefold chaos` with every kind of fault: each found, named, answered, and without a trace in what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Fivefold, kinds

from jobs.injections import KINDS
from orchestrator.control.chaos_schedule import CATALOGUE
from orchestrator.run_folder import RunFolder

TINY = str(Path(__file__).with_name("tiny.yaml"))
ONCE = [entry.name for entry in CATALOGUE if entry.name not in ("slow_compute_1.2", "controller_killed_at_start")]
"""A fifth of a step of 0.1 s, on two cores that others use too, is less than its own noise."""


@pytest.mark.chaos
@pytest.mark.timeout(660)
def test_every_kind_of_fault_in_one_run(fivefold: Fivefold) -> None:
    chosen = ("--kinds", ",".join(ONCE), "--seed", "1", "policy.grace_seconds=20")
    answer = fivefold("chaos", TINY, "train.steps=360", *chosen, seconds=600)
    card, events = answer.document, kinds(RunFolder(answer.document["run_folder"]))
    print(answer.told[answer.told.rfind(" fault ") :])
    assert {entry.kind for entry in CATALOGUE if entry.name in ONCE} == set(KINDS)
    assert len(KINDS) >= 24
    assert card["count"] == events.count("fault_injected") == len(ONCE)
    assert card["right"] >= 0.95 * card["count"], [line for line in card["faults"] if not line["right"]]
    assert (card["same_loss"], card["state"]) == (True, "done")
