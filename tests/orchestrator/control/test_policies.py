"""What follows from failures."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as some
from sample_runs import event_line

from jobs.spec import PolicySpec
from orchestrator.control.policies import Failure, Kind, after_failure, blamed, failed_how, history, suspects
from orchestrator.messages import Replan, Restart, Stop

HOUR = 3600.0
KINDS = get_args(Kind)


def failed(kind: Kind, step: int, reason: str = "", hours: float = 0.0, node: str | None = None) -> Failure:
    return Failure(kind, reason or f"{kind} happened", step, hours * HOUR, node)


def killed(*steps: int, rank: int = 1) -> list[Failure]:
    return [failed("rank_died", step, f"rank {rank} was ended by SIGKILL") for step in steps]


RAISED = "rank {} failed: RuntimeError: expected 3 at 0x7f{}"
HUNG = "rank 2 is stopped by a signal in compute of step {}: 5.3 s, at most 5.0 s are usual"


@pytest.mark.parametrize(
    ("failures", "decision"),
    [
        # One failure of each kind.
        (killed(5), "restart"),
        ([failed("rank_died", 5, "rank 0 was ended by SIGSEGV")], "restart"),
        ([failed("rank_failed", 5, RAISED.format(0, 11))], "restart"),
        ([failed("rank_exited", 5, "rank 0 ended with code 3")], "restart"),
        ([failed("rank_hung", 5, HUNG.format(6))], "restart"),
        ([failed("node_lost", 5)], "restart"),
        ([failed("diverged", 5)], "restart"),
        ([failed("out_of_memory", 5)], "replan"),
        ([failed("preempted", 5)], "restart"),
        ([failed("input_error", 5)], "stop"),
        # What is the same at one step does not mend; numbers and addresses in it do not make it another.
        ([failed("rank_failed", 5, RAISED.format(0, 11)), failed("rank_failed", 5, RAISED.format(3, 22))], "stop"),
        ([failed("rank_died", 5, "rank 0 was ended by SIGSEGV")] * 2, "stop"),
        ([failed("diverged", 40)] * 2, "stop"),
        ([failed("rank_hung", 5, HUNG.format(6)), failed("rank_hung", 5, HUNG.format(6))], "stop"),
        ([failed("rank_failed", 5, "A: x"), *killed(5), failed("rank_failed", 5, "A: x")], "stop"),
        ([failed("out_of_memory", 0)] * 2, "stop"),
        # Another error, another step, or chance is to be tried again.
        ([failed("rank_failed", 5, "A: x"), failed("rank_failed", 5, "B: x")], "wait"),
        ([failed("rank_failed", 5, "A: x"), failed("rank_failed", 9, "A: x")], "restart"),
        ([failed("diverged", 40), failed("diverged", 60)], "restart"),
        (killed(5, 5), "wait"),
        ([failed("node_lost", 5)] * 2, "wait"),
        # The budget: of the window alone, and preemption is free.
        (killed(5, 6, 7, 8), "stop"),
        ([failed("rank_died", step, hours=10.0 * step) for step in range(1, 9)], "restart"),
        ([failed("rank_died", step, hours=5.0 * step) for step in range(1, 9)], "stop"),
        ([*killed(5, 6, 7), *[failed("preempted", 7)] * 9], "restart"),
        ([*[failed("preempted", 7)] * 9, *killed(8)], "restart"),
        ([*[failed("preempted", 7)] * 9, failed("out_of_memory", 8)], "replan"),
    ],
)
def test_what_is_right(failures: list[Failure], decision: str) -> None:
    decided = after_failure(failures, PolicySpec())
    found = {Stop: "stop", Replan: "replan", Restart: "restart"}[type(decided)]
    if isinstance(decided, Restart) and decided.delay_seconds:
        found = "wait"
    assert (found, decided.reason.startswith(failures[-1].reason)) == (decision, True)


def test_a_run_that_comes_no_further_is_given_up_whatever_its_budget() -> None:
    policy = PolicySpec(max_restarts=99)
    assert isinstance(after_failure(killed(9, 8, 9, 7), policy), Restart)
    decided = after_failure(killed(9, 8, 9, 7, 9), policy)
    assert decided.reason == "rank 1 was ended by SIGKILL (no new step was reached in 4 attempts)"
    assert isinstance(after_failure(killed(9, 8, 9, 7, 10), policy), Restart)


def test_a_restart_that_got_nowhere_waits_longer_each_time() -> None:
    policy = PolicySpec(max_restarts=99)
    decided = [after_failure(killed(9, *[8] * futile), policy) for futile in range(4)]
    waits = [decision.delay_seconds for decision in decided if isinstance(decision, Restart)]
    assert waits[0] == 0
    assert all(0.5 * longest <= wait <= longest for wait, longest in zip(waits[1:], (1, 2, 4), strict=True))
    at_once = {
        after_failure([*killed(9), Failure("rank_died", "killed", 9, at)], policy).delay_seconds  # type: ignore[union-attr]
        for at in range(100)
    }
    assert len(at_once) == 100  # jobs that fail together do not come back together


def test_without_a_budget_the_first_failure_is_the_last() -> None:
    decision = after_failure(killed(5), PolicySpec(max_restarts=0))
    spent = "rank 1 was ended by SIGKILL (1 failed attempts in 24 h, policy.max_restarts=0)"
    assert decision == Stop(state="failed", reason=spent)


@given(
    some.lists(
        some.tuples(some.sampled_from(KINDS), some.integers(0, 30), some.floats(0, 20)), min_size=1, max_size=40
    ),
    some.integers(0, 8),
    some.floats(0.5, 48),
)
def test_no_history_gets_more_restarts_than_its_window_allows(
    drawn: list[tuple[Kind, int, float]], budget: int, hours: float
) -> None:
    policy, at, history = PolicySpec(max_restarts=budget, window_hours=hours), 0.0, []
    for kind, step, later in drawn:
        at += later
        history.append(failed(kind, step, hours=at))
        decision = after_failure(history, policy)
        assert decision == after_failure(list(history), policy)
        # In the policy's own unit: at the window's very edge another rounds otherwise.
        newest = history[-1].at
        in_window = [each for each in history if each.kind != "preempted" and newest - each.at <= HOUR * hours]
        if kind == "preempted":
            assert decision == Restart(reason="preempted happened")
        elif kind == "input_error" or len(in_window) > budget:
            assert isinstance(decision, Stop)
        elif isinstance(decision, Restart):
            assert 0 <= decision.delay_seconds <= 60


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "out_of_memory"),
        ("MemoryError: ", "out_of_memory"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "out_of_memory"),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", "rank_failed"),
    ],
)
def test_memory_that_ran_out_is_told_by_the_error(message: str, kind: Kind) -> None:
    assert failed_how(message) == kind


def test_a_node_is_suspect_once_it_was_to_blame_twice_in_the_window() -> None:
    policy = PolicySpec(window_hours=2)
    once = [failed("rank_hung", 1, node="a"), failed("rank_died", 2, node="b"), failed("rank_failed", 3, node="a")]
    assert suspects(once, policy) == set()
    assert suspects([*once, failed("rank_died", 4, node="a", hours=1)], policy) == {"a"}
    assert suspects([*once, failed("rank_died", 4, node="a", hours=3)], policy) == set()
    assert suspects([*once, failed("rank_died", 4)], policy) == set()


def test_a_history_is_what_events_tell_since_somebody_said_go_on() -> None:
    def line(step: int) -> dict[str, object]:
        data = {"step": step, "failure": "rank_died", "reason": "killed", "node": "a"}
        return event_line("attempt_failed", "step ...", 1, 10.0 * step, **data)

    told = [line(1), event_line("resumed", "", 1, 15.0), line(2), event_line("restarting", "", 1, 16.0), line(3)]
    assert history(told) == [Failure("rank_died", "killed", step, 10.0 * step, "a") for step in (2, 3)]


def test_what_led_to_the_other_is_blamed_whichever_is_told_first() -> None:
    told = [failed(kind, 1) for kind in KINDS]
    for order in itertools.permutations(told, 3):
        found = None
        for failure in order:
            found = blamed(found, failure)
        assert found is min(order, key=told.index)


def test_of_equals_the_first_is_blamed_and_nothing_for_nothing() -> None:
    first, second = killed(5, 6)
    assert blamed(first, second) is first
    assert blamed(first, None) is blamed(None, first) is first
    assert blamed(None, None) is None
