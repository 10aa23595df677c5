"""The learning rate's shape, from the formula's own landmarks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.spec import TrainSpec
from orchestrator.worker.schedule import learning_rate


def train(steps: int, warmup: int) -> TrainSpec:
    return TrainSpec(
        steps=steps,
        sequence_length=8,
        global_batch=1,
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        warmup_steps=warmup,
    )


def test_landmarks() -> None:
    spec = train(steps=110, warmup=10)
    assert learning_rate(spec, 1) == pytest.approx(1e-4)
    assert learning_rate(spec, 5) == pytest.approx(5e-4)
    assert learning_rate(spec, 10) == pytest.approx(1e-3)
    assert learning_rate(spec, 60) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(spec, 110) == pytest.approx(1e-4)


@given(st.integers(1, 300), st.data())
def test_it_rises_to_the_top_and_falls_to_the_floor(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps))
    rates = [learning_rate(train(steps, warmup), step) for step in range(1, steps + 1)]
    top = max(warmup - 1, 0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    assert max(rates) <= 1e-3
    assert rates[-1] == pytest.approx(1e-3 if warmup == steps else 1e-4)


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_outside_of_the_run_has_no_rate(step: int) -> None:
    with pytest.raises(ValueError, match=r"not within 1\.\.10"):
        learning_rate(train(steps=10, warmup=0), step)
