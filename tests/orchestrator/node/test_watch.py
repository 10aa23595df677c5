"""Who is called hung, of beats made by hand: never a rank that is only slow."""

from __future__ import annotations

import random

import pytest

from orchestrator.node.watch import Reading, Stall, Watch
from orchestrator.pulse import Beat, Phase


def beat(
    step: int,
    phase: Phase,
    since: float,
    inside: bool = False,
    name: str = "allreduce dp",
    over: tuple[tuple[Phase, float], ...] = (),
) -> Beat:
    return Beat(step, phase, since, step, name, since, inside, over)


def trained(seconds: float = 0.05, steps: int = 50) -> tuple[Watch, float]:
    """A watch that has seen so many steps of two ranks, and the time."""
    phases: tuple[tuple[Phase, float], ...] = (("data", 0.1), ("compute", 0.8), ("agree", 0.1))
    watch, now = Watch(), 0.0
    over = tuple((phase, share * seconds) for phase, share in phases)
    for step in range(1, steps + 1):
        now += seconds
        assert watch.look(now, {rank: Reading(beat(step, "data", now, over=over), False) for rank in (0, 1)}) is None
    return watch, now


def after(watch: Watch, now: float, readings: dict[int, Reading]) -> Stall:
    """What is told, once it is told at all: within the promised bound of a quick step."""
    for moment in range(1, 100):
        stall = watch.look(now + 0.25 * moment, readings)
        if stall:
            assert 5 < 0.25 * moment <= 6
            return stall
    raise AssertionError("nothing was told in 25 s")


def test_ten_thousand_steps_with_slow_evaluations_and_saves_alarm_nobody() -> None:
    draw, watch, now = random.Random(1), Watch(), 0.0
    over: tuple[tuple[Phase, float], ...] = ()
    phases: tuple[tuple[Phase, float], ...] = (("data", 0.01), ("compute", 0.2), ("evaluate", 8.0), ("agree", 0.005))
    for step in range(1, 10_001):
        for phase, seconds in (*phases, ("checkpoint", 6.0)):
            if (phase == "evaluate" and step % 100) or (phase == "checkpoint" and step % 50):
                continue
            began = now
            took = seconds * draw.lognormvariate(0, 0.4)
            now += took
            waits = phase == "compute" and draw.random() < 0.5
            readings = {
                rank: Reading(beat(step, phase, began, waits and rank == 1, over=over), False) for rank in (0, 1)
            }
            assert watch.look(now - 1e-3, readings) is None, (step, phase)
            over = ((phase, took),)


def test_the_first_step_of_each_attempt_may_take_long_and_the_others_no_longer_for_that() -> None:
    watch, now = Watch(), 0.0
    for _ in range(4):
        watch.begin()
        for step in range(20):
            took = 0.6 if step else 8.0
            at_once = {0: Reading(beat(step, "compute", now), False)}
            assert watch.look(now + took - 1e-3, at_once) is None
            now += took
            over: tuple[tuple[Phase, float], ...] = (("compute", took),)
            assert watch.look(now, {0: Reading(beat(step, "agree", now, over=over), False)}) is None
    stall = after(watch, now, {0: Reading(beat(20, "compute", now), False)})
    assert stall.kind == "no progress"


@pytest.mark.parametrize("phase", ["compute", "evaluate", "restore"])
def test_a_rank_that_is_stopped_is_named_though_all_wait_and_though_the_phase_is_new(phase: Phase) -> None:
    watch, now = trained()
    readings = {
        0: Reading(beat(51, phase, now, inside=True), False),
        1: Reading(beat(51, phase, now, inside=True), True),
    }
    stall = after(watch, now, readings)
    assert (stall.rank, stall.kind, stall.beat.phase, stall.beat.step) == (1, "stopped", phase, 51)


@pytest.mark.parametrize("phase", ["data", "compute"])
def test_a_rank_that_spins_or_holds_a_lock_is_who_is_in_no_collective(phase: Phase) -> None:
    watch, now = trained()
    readings = {0: Reading(beat(51, "compute", now, inside=True), False), 1: Reading(beat(51, phase, now), False)}
    stall = after(watch, now, readings)
    assert (stall.rank, stall.kind, stall.beat.phase) == (1, "no progress", phase)


def test_a_rank_that_beats_but_goes_nowhere_is_to_blame_for_who_waits() -> None:
    watch, now = trained()
    told = None
    circle: tuple[tuple[Phase, float], ...] = (("data", 0.01), ("compute", 0.01)) * 12
    for moment in range(1, 40):
        at = now + 0.25 * moment
        readings = {
            0: Reading(beat(51, "compute", now, inside=True), False),
            1: Reading(beat(51, "data", at - 0.01, over=circle), False),
        }
        told = told or watch.look(at, readings)
    assert told is not None
    assert (told.rank, told.kind) == (1, "no progress")


def test_a_rank_that_goes_in_circles_is_told_of_though_nobody_waits_for_it() -> None:
    watch, now = trained()
    circle: tuple[tuple[Phase, float], ...] = (("data", 0.01), ("compute", 0.01)) * 12
    told = None
    for moment in range(1, 40):
        at = now + 0.25 * moment
        told = watch.look(at, {0: Reading(beat(51, "data", at - 0.01, over=circle), False)})
        if told:
            break
    assert told is not None
    assert (told.rank, told.kind) == (0, "no progress")
    assert 5 < at - now <= 6


def test_a_long_evaluation_after_many_quick_steps_between_two_looks_is_no_circle() -> None:
    watch, now = trained()
    quick: tuple[tuple[Phase, float], ...] = (("data", 0.001), ("compute", 0.008), ("agree", 0.001)) * 25
    for moment in range(60):
        over = quick if moment == 0 else ()
        assert watch.look(now + moment / 2, {0: Reading(beat(76, "evaluate", now, over=over), False)}) is None


def test_who_waits_for_a_rank_that_is_at_something_long_is_patient() -> None:
    watch, now = trained()
    saving = {0: Reading(beat(51, "checkpoint", now), False), 1: Reading(beat(52, "compute", now, inside=True), False)}
    usual: tuple[tuple[Phase, float], ...] = (("checkpoint", 12.0),)
    watch.look(now, {0: Reading(beat(51, "checkpoint", now, over=usual), False)})
    assert [watch.look(now + seconds, saving) for seconds in (5.5, 20.0, 59.0)] == [None] * 3
    stall = watch.look(now + 61.0, saving)  # five times what it takes
    assert stall is not None
    assert (stall.rank, stall.beat.phase) == (0, "checkpoint")


def test_a_rank_that_left_a_collective_out_is_the_odd_one() -> None:
    watch, now = trained()
    readings = {rank: Reading(beat(50, "agree", now, inside=True, name="allreduce other"), False) for rank in (0, 1, 2)}
    readings[3] = Reading(beat(51, "compute", now + 0.01, inside=True), False)
    stall = after(watch, now, readings)
    assert (stall.rank, stall.kind) == (3, "skipped a collective")
    # Of two, who is further on.
    stall = after(watch, now, {0: readings[0], 3: readings[3]})
    assert stall.rank == 3


def test_all_ranks_of_a_node_may_wait_for_another_node() -> None:
    watch, now = trained()
    readings = {rank: Reading(beat(51, "compute", now, inside=True), False) for rank in (0, 1)}
    assert after(watch, now, readings).kind == "waiting"


def test_steps_of_a_minute_get_minutes() -> None:
    watch, now = trained(seconds=60.0, steps=10)
    readings = {0: Reading(beat(11, "compute", now), False), 1: Reading(beat(11, "compute", now, inside=True), False)}
    assert watch.look(now + 200, readings) is None
    stall = watch.look(now + 241, readings)
    assert stall is not None
    assert stall.rank == 0
