"""A loss that has left what training does, told from one that only jumps."""

from __future__ import annotations

import math
import random

import pytest

from orchestrator.control.divergence import Divergence


def healthy(steps: int, seed: int = 1) -> list[float]:
    """Falls from ln 257 to 2.4 nats, with noise and now and then a spike of one or two steps."""
    draw, losses = random.Random(seed), []
    while len(losses) < steps:
        level = 2.4 + 3.1 * math.exp(-len(losses) / 300)
        spike = draw.choice((1, 2)) if draw.random() < 0.01 else 0
        losses += [level * draw.uniform(1.5, 4.0) for _ in range(spike)] or [level + draw.gauss(0, 0.1)]
    return losses[:steps]


@pytest.mark.parametrize("seed", range(5))
def test_ten_thousand_healthy_steps_alarm_nobody(seed: int) -> None:
    watch = Divergence()
    assert not [step for step, loss in enumerate(healthy(10_000, seed), 1) if watch.add(step, loss, 1.0)]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_no_number_is_told_at_once(loss: float, norm: float) -> None:
    assert Divergence().add(1, loss, norm) == 1


@pytest.mark.parametrize("factor", [3.0, 10.0, 1e6])
def test_a_loss_that_stays_far_too_high_is_told_with_the_step_at_which_it_rose(factor: float) -> None:
    watch = Divergence()
    for step, loss in enumerate(healthy(400), 1):
        assert watch.add(step, loss, 1.0) is None
    assert [watch.add(step, 2.6 * factor, 1.0) for step in range(401, 406)] == [None] * 4 + [401]


def test_a_loss_that_becomes_no_number_rose_before() -> None:
    watch = Divergence()
    for step in range(1, 20):
        watch.add(step, 3.0, 1.0)
    assert (watch.add(20, 30.0, 1.0), watch.add(21, math.nan, 1.0)) == (None, 20)


def test_steps_that_an_attempt_goes_back_behind_never_were() -> None:
    watch = Divergence()
    for step in range(1, 20):
        watch.add(step, 3.0, 1.0)
    assert [watch.add(step, 9.0, 1.0) for step in range(20, 25)][-1] == 20
    watch.begin(12)
    assert [watch.add(step, 9.0 if step == 14 else 3.0, 1.0) for step in range(13, 30)] == [None] * 17
