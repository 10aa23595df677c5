"""`fivefold chaos` with real faults: each found, named, answered, and without a trace in what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Fivefold, kinds

from orchestrator.control.chaos_schedule import NAMES, UNDETECTED
from orchestrator.run_folder import RunFolder

TINY = str(Path(__file__).with_name("tiny.yaml"))
WITHIN_ONE_SESSION = (
    "exception",
    "kill",
    "segfault",
    "out_of_memory",
    "save_killed",
    "disk_full",
    "storage_error",
    "byte_flipped",
    "truncated",
    "deleted",
)


def test_faults_that_a_run_survives_in_one_session(fivefold: Fivefold) -> None:
    answer = fivefold("chaos", TINY, "train.steps=52", "--kinds", ",".join(WITHIN_ONE_SESSION))
    assert_all_right(answer.code, answer.document, len(WITHIN_ONE_SESSION))
    stormy = RunFolder(answer.document["run_folder"])
    assert kinds(stormy).count("fault_injected") == kinds(stormy).count("restarting") == len(WITHIN_ONE_SESSION)
    assert kinds(stormy).count("nodes_ready") == 1


@pytest.mark.slow
def test_all_that_is_looked_for(fivefold: Fivefold) -> None:
    answer = fivefold("chaos", TINY, "train.steps=100", "--seed", "1", seconds=170)
    assert_all_right(answer.code, answer.document, len(NAMES) - len(UNDETECTED))


def assert_all_right(code: int, card: dict, count: int) -> None:
    assert [line for line in card["faults"] if not line["right"]] == []
    assert (code, card["count"], card["same_loss"], card["state"]) == (0, count, True, "done")
