"""What measured steps say of others: residuals found again, honest intervals, the run worth most, memory learnt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import GIB, hardware
from parallel.estimates.memory import estimate_memory
from parallel.estimates.software import OURS, Software, software
from parallel.estimates.workload import Workload
from parallel.evidence.calibration import (
    Belief,
    Calibration,
    MemoryCalibration,
    Observation,
    expected_maximum,
    next_run,
    settled,
)
from parallel.layout import Layout

H200 = hardware("h200", 8)
LAYOUTS = (
    Layout(dp=8), Layout(dp=8, ep=8), Layout(dp=4, tp=2, ep=4), Layout(dp=2, tp=4, ep=8), Layout(dp=4, pp=2, ep=4),
    Layout(dp=2, pp=4), Layout(dp=2, tp=2, pp=2, ep=4), Layout(dp=4, cp=2, ep=8), Layout(tp=8, etp=8),
)  # fmt: skip


@pytest.fixture(scope="module")
def steps(make_job: Any) -> list[Workload]:
    """Layouts of a mixture on eight H200s, each with two micro-batches."""
    job = make_job("mixtral_8x7b", "h200_x8", model_changes={"layers": 8}, global_batch=32)
    return [Workload.of(job, layout, micro_batch) for layout in LAYOUTS for micro_batch in (1, 4)]


def measured(steps: list[Workload], truth: Software) -> list[Observation]:
    return [Observation(step, estimate_time(step, H200, truth).total) for step in steps]


def test_residuals_that_made_the_measurements_are_found_again(steps: list[Workload]) -> None:
    shipped = software(OURS)
    truth = replace(shipped, compute=1.3 * shipped.compute, memory=1.4 * shipped.memory, network=1.5 * shipped.network)
    found = Calibration(H200, OURS, measured(steps, truth)).software
    for name in ("compute", "memory", "network"):
        assert getattr(shipped, name) < getattr(found, name), name
    # Products and kernels that move memory slow the same layers down: the two are told apart by their sum.
    for name in ("compute", "network"):
        assert getattr(found, name) < 1.1 * getattr(truth, name), name
    # From one micro-batch of each layout to the other.
    true = np.log([each.seconds for each in measured(steps[1::2], truth)])
    errors = [
        np.abs(Calibration(H200, OURS, seen).believe(steps[1::2]).mean - true).mean()
        for seen in ([], measured(steps[::2], truth))
    ]
    assert errors[1] < errors[0] / 3


def test_without_a_run_the_shipped_residuals_stand(steps: list[Workload]) -> None:
    nothing = Calibration(H200, OURS)
    assert nothing.software == software(OURS)
    assert nothing.believe(steps).seconds == pytest.approx([estimate_time(step, H200).total for step in steps])
    # What nobody measured starts as arithmetic, and may be far from it where the host starts kernels.
    small = [replace(step, sequence_length=128) for step in steps]
    assert (Calibration(H200, "").believe(small).deviation > nothing.believe(small).deviation).all()


def test_intervals_cover_what_the_model_draws(steps: list[Workload]) -> None:
    """Truths drawn from the prior, three steps of each measured: of the others nine in ten are within."""
    draw, within = np.random.default_rng(1), []
    prior = Calibration(H200, OURS).believe(steps)
    for _ in range(15):
        true = draw.multivariate_normal(prior.mean, prior.covariance, method="cholesky")
        seen = draw.choice(len(steps), 3, replace=False)
        belief = Calibration(H200, OURS, [Observation(steps[at], float(np.exp(true[at]))) for at in seen]).believe(
            steps
        )
        rest = np.setdiff1d(np.arange(len(steps)), seen)
        intervals = [belief.interval(at) for at in rest]
        within += [low <= np.exp(true[at]) <= high for at, (low, high) in zip(rest, intervals, strict=True)]
    assert 0.84 < np.mean(within) < 0.97


def test_a_measured_step_is_known_and_its_neighbours_better(steps: list[Workload]) -> None:
    before = Calibration(H200, OURS).believe(steps).deviation
    after = Calibration(H200, OURS, measured(steps[:1], software(OURS))).believe(steps).deviation
    assert after[0] < 0.02 < before[0]
    assert (after <= before).all()
    # The other micro-batch of the layout is nearer than a pipeline.
    pipeline = LAYOUTS.index(Layout(dp=2, pp=4)) * 2
    assert after[1] / before[1] < after[pipeline] / before[pipeline]
    # A median of steps that differ by a fifth says less.
    rough = replace(measured(steps[:1], software(OURS))[0], deviation=0.2)
    assert Calibration(H200, OURS, [rough]).believe(steps).deviation[0] > 5 * after[0]


def test_the_maximum_of_lines_is_that_of_a_sample() -> None:
    draw = np.random.default_rng(2)
    chance = draw.standard_normal(200_000)
    for _ in range(5):
        starts, slopes = draw.standard_normal(6), draw.standard_normal(6)
        slopes[1], starts[2] = slopes[0], starts[3]
        sampled = np.max(starts[:, None] + slopes[:, None] * chance, axis=0).mean()
        assert expected_maximum(starts, slopes) == pytest.approx(sampled, abs=0.02)


def test_the_next_run_is_the_one_that_can_change_the_choice() -> None:
    """Of four: the best is known, one may be better, one is as unsure but far behind, one ahead runs out of memory."""
    belief = Belief(np.log([1.0, 1.05, 2.0, 0.9]), np.diag([0.01, 0.1, 0.1, 0.1]) ** 2)
    assert next_run(belief, [0.0, 0.0, 0.0, 0.999], [0, 1, 2, 3]) == 1
    assert next_run(belief, [0.0, 0.0, 0.0, 0.0], [0, 1, 2, 3]) == 3
    assert not settled(belief, 0)
    assert settled(Belief(np.log([1.0, 1.05, 2.0]), np.diag([0.01, 0.01, 0.1]) ** 2), 0)
    # Unsure of both alike is sure of which is shorter.
    alike = np.full((2, 2), 0.04) + np.diag([1e-4, 1e-4])
    assert settled(Belief(np.log([1.0, 1.1]), alike), 0)


def test_memory_is_learnt_from_what_fits_and_from_what_does_not(steps: list[Workload]) -> None:
    tight = steps[0]
    device = replace(H200, memory_bytes=round(1.1 * estimate_memory(tight, H200).total))
    likely, out = MemoryCalibration(device).of(tight)
    assert likely == pytest.approx(estimate_memory(tight, device).total)
    assert 0.05 < out < 0.5
    ran_out = MemoryCalibration(device, [Observation(steps[1], out_of_memory=True)])
    assert ran_out.of(tight)[1] > out
    assert ran_out.of(steps[1])[1] > 0.9
    less = Observation(steps[1], memory_bytes=0.8 * estimate_memory(steps[1], device).allocated)
    assert MemoryCalibration(device, [less]).of(tight)[1] < out / 2
    known = MemoryCalibration(device, [replace(less, workload=tight, memory_bytes=40 * GIB)]).of(tight)
    assert known[0] == pytest.approx(40 * GIB + estimate_memory(tight, device).overhead, rel=0.01)
