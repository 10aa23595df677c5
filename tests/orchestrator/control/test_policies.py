"""What follows from failures."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from jobs.spec import PolicySpec
from orchestrator.control.policies import Failure, Kind, after_failure, blamed
from orchestrator.messages import Restart, Stop


def failures(*kinds: Kind) -> list[Failure]:
    return [Failure(kind, f"reason {number}", step=number) for number, kind in enumerate(kinds, 1)]


@pytest.mark.parametrize("kind", [kind for kind in get_args(Kind) if kind != "input_error"])
def test_within_the_budget_a_run_restarts(kind: Kind) -> None:
    policy = PolicySpec(max_restarts=2)
    assert after_failure(failures(kind), policy) == Restart(reason="reason 1")
    assert after_failure(failures(kind, kind), policy) == Restart(reason="reason 2")
    spent = "reason 3 (3 failed attempts, policy.max_restarts=2)"
    assert after_failure(failures(kind, kind, kind), policy) == Stop(state="failed", reason=spent)


def test_without_a_budget_the_first_failure_is_the_last() -> None:
    decision = after_failure(failures("rank_died"), PolicySpec(max_restarts=0))
    assert decision == Stop(state="failed", reason="reason 1 (1 failed attempts, policy.max_restarts=0)")


def test_no_restart_mends_the_users_input() -> None:
    policy = PolicySpec(max_restarts=9)
    assert after_failure(failures("input_error"), policy) == Stop(state="failed", reason="reason 1")
    assert after_failure(failures("rank_died", "input_error"), policy) == Stop(state="failed", reason="reason 2")


def test_what_led_to_the_other_is_blamed_whichever_is_told_first() -> None:
    told = failures(*get_args(Kind))
    for order in itertools.permutations(told, 3):
        found = None
        for failure in order:
            found = blamed(found, failure)
        assert found is min(order, key=told.index)


def test_of_equals_the_first_is_blamed_and_nothing_for_nothing() -> None:
    first, second = failures("rank_died", "rank_died")
    assert blamed(first, second) is first
    assert blamed(first, None) is blamed(None, first) is first
    assert blamed(None, None) is None
