"""From a few measured steps to what is believed of every other: residuals of a software version on a device, with
uncertainty, and the step to measure next.

A step's seconds are `log y = log t(theta) + delta + noise` (Kennedy and O'Hagan 2001): t is estimate_time, theta the
residuals of Software as logarithms, normal about the shipped ones; delta is what no residuals explain: a factor of all
steps, where the version was not measured, and a Gaussian process over layouts whose nearness lessens with each doubling
of a degree; noise is a repeat's. The update is
Gauss-Newton's: linear in theta about the mode, iterated. The numbers are of calibration_fitted.json, by
calibration_fitting.py.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from math import erfc, exp, log, pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.estimates import memory
from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import Hardware
from parallel.estimates.software import Software, software, spread
from parallel.estimates.workload import Workload

Array = NDArray[np.float64]

FITTED: dict[str, Any] = json.loads((files("parallel.evidence") / "calibration_fitted.json").read_text())
"""between: standard deviations of residuals from one version to another, of logarithms but for step_seconds, which is
in seconds. left_over: of delta, the standard deviations of the part that near steps share and of each one's own, and
the distance at which the shared part has fallen to 1/e."""

RESIDUALS = tuple(FITTED["between"])
"""Fields of Software that are calibrated."""

LEAST = {"network": log(1.3), "data": log(1.3), "compute": log(1.1)}
"""Standard deviations of residuals that versions alone may not be taken to show: collectives within a step take 30%
longer than alone (arXiv 2312.12391, section 4), and boards of one name differ by a tenth in their clocks."""

REPEAT = 0.01
"""Of the logarithm of a step measured again: repeats of one configuration differ by up to 2.8%, twice the deviation of
a difference of two (of published repeats, the largest)."""

INTERVAL = 1.645
"""Standard deviations to either side within which nine of ten lie."""

NOISE = 0.028
"""Of one configuration's repeats, the most by which the logarithms of two published ones differ."""

_STEP, _STILL, _ROUNDS = 1e-3, 1e-4, 20
"""Of residuals: the one that gives a derivative, the one that ends the search, and how many there are at most."""

_SHARED = _OWN = (memory.FITTED["spread_held"] ** 2 + memory.FITTED["spread_passing"] ** 2) / 4 / 2
"""Variances of the logarithm of bytes over their estimate: what all steps share, and each one's own, of a rank half of
whose memory comes and goes. That they are halves of the whole is an assumption: one published source of split
`calibrate` alone tells of more than one."""

UNSEEN = 0.02
"""Of steps, those that run out of memory for a reason that no estimate sees, as memory_fitting.py has it."""

_TINY = 1e-300

_FIXED = RESIDUALS.index("step_seconds")


@dataclass(frozen=True)
class Observation:
    """A layout that was run. `seconds` and `memory_bytes` are None where it did not come so far."""

    workload: Workload
    seconds: float | None = None
    """Of a step."""
    deviation: float = 0.0
    """Of the logarithm of `seconds`, by how the steps that it was taken from differ."""
    memory_bytes: float | None = None
    """Tensors' peak, of the fullest rank."""
    out_of_memory: bool = False


@dataclass(frozen=True)
class Belief:
    """Of several workloads, of the logarithm of a step's seconds; steps share residuals, and so their errors."""

    mean: Array
    """[n]"""
    covariance: Array
    """[n, n]"""

    @property
    def deviation(self) -> Array:
        """[n]"""
        return np.sqrt(np.diag(self.covariance))

    @property
    def seconds(self) -> Array:
        """[n], medians."""
        return np.exp(self.mean)

    def interval(self, index: int) -> tuple[float, float]:
        """Seconds between which a step lies in nine cases of ten."""
        spread = INTERVAL * self.deviation[index]
        return float(np.exp(self.mean[index] - spread)), float(np.exp(self.mean[index] + spread))

    def against(self, index: int) -> tuple[Array, Array]:
        """Of the logarithm of each step over that of `index`: means and standard deviations, [n] each."""
        own = self.covariance[index]
        variance = np.diag(self.covariance) - 2 * own + own[index]
        return self.mean - self.mean[index], np.sqrt(np.maximum(variance, 0.0))


class Calibration:
    """What the observations of one software version on one device say of any step of the two."""

    def __init__(self, device: Hardware, version: str, observations: Sequence[Observation] = ()) -> None:
        self.device, self.version = device, version
        self._shipped = software(version)
        # Steps of a version that was not measured are off together, as those of measured ones are when left out of the
        # fit: by what spread tells beyond layouts' own errors.
        left_over = FITTED["left_over"]["shared"] ** 2 + FITTED["left_over"]["own"] ** 2
        self._common = max(0.0, (log(spread(version)) / INTERVAL) ** 2 - left_over)
        timed = [each for each in observations if each.seconds]
        self._seen = [each.workload for each in timed]
        self._measured = np.log([each.seconds or 1.0 for each in timed])
        self._noise = np.array([REPEAT**2 + each.deviation**2 for each in timed])
        self._prior = np.array(list(FITTED["between"].values())) ** 2
        self._shift = np.zeros(len(RESIDUALS))
        self._settle()

    @property
    def software(self) -> Software:
        """Facts of the version with the residuals that are likeliest now."""
        return self._at(self._shift)

    def believe(self, workloads: Sequence[Workload]) -> Belief:
        """Of steps that may have been measured or not (Rasmussen and Williams 2006, section 2.7)."""
        logs, slopes = self._linear(workloads)
        joint = (slopes * self._prior) @ slopes.T + self._delta(workloads, workloads)
        if self._seen:
            near = self._delta(workloads, self._seen)
            across = (slopes * self._prior) @ self._slopes.T + near
            logs = logs + near @ np.linalg.solve(self._apart, self._left)
            joint = joint - across @ np.linalg.solve(self._joint, across.T)
        return Belief(logs, (joint + joint.T) / 2)

    def _settle(self) -> None:
        """Gauss-Newton to the mode of theta, delta integrated out."""
        self._apart = self._delta(self._seen, self._seen) + np.diag(self._noise)
        for _ in range(_ROUNDS):
            logs, self._slopes = self._linear(self._seen)
            self._left = self._measured - logs
            self._joint = (self._slopes * self._prior) @ self._slopes.T + self._apart
            wanted = np.linalg.solve(self._joint, self._left + self._slopes @ self._shift)
            found = self._prior * (self._slopes.T @ wanted)
            found[_FIXED] = max(found[_FIXED], -self._shipped.step_seconds)
            moved, self._shift = float(np.abs(found - self._shift).max()), found
            if moved < _STILL:
                break

    def _delta(self, rows: Sequence[Workload], columns: Sequence[Workload]) -> Array:
        """Covariance of what residuals do not explain, [rows, columns]: what all steps share, and near ones."""
        covariance: Array = self._common + _nearness(rows, columns)
        return covariance

    def _at(self, shift: Array) -> Software:
        """The shipped residuals moved: added to step_seconds, to the others' logarithms."""
        shipped = {name: getattr(self._shipped, name) for name in RESIDUALS}
        changes: dict[str, Any] = {name: shipped[name] * exp(by) for name, by in zip(RESIDUALS, shift, strict=True)}
        changes["step_seconds"] = shipped["step_seconds"] + shift[_FIXED]
        return replace(self._shipped, **changes)

    def _linear(self, workloads: Sequence[Workload]) -> tuple[Array, Array]:
        """Logarithms of seconds at the present residuals, [n], and their derivatives, [n, residuals]."""

        def logs(shift: Array) -> Array:
            run_by = self._at(shift)
            return np.log([estimate_time(each, self.device, run_by).total for each in workloads])

        here = logs(self._shift)
        slopes = [(logs(self._shift + _STEP * row) - here) / _STEP for row in np.eye(len(RESIDUALS))]
        return here, np.stack(slopes, axis=1)


class MemoryCalibration:
    """What runs on a device say of the memory of others: `log bytes = log estimate + shared + own`, both normal."""

    def __init__(self, device: Hardware, observations: Sequence[Observation] = ()) -> None:
        self.device = device
        told = [each for each in observations if each.memory_bytes or each.out_of_memory]
        self._places = {workload: place for place, workload in enumerate({each.workload: None for each in told}, 1)}
        self._mean = np.zeros(1 + len(self._places))
        self._covariance = np.diag([_SHARED, *[_OWN] * len(self._places)])
        # What was measured first: it says where what ran out lies, and not the other way round.
        for each in sorted(told, key=lambda each: each.out_of_memory):
            estimate = memory.estimate_memory(each.workload, device)
            if each.memory_bytes:
                self._observe(each.workload, log(each.memory_bytes / estimate.allocated), 0.0)
            else:
                self._exceed(each.workload, log(self._room(estimate) / estimate.allocated))

    def of(self, workload: Workload) -> tuple[float, float]:
        """Bytes of the fullest rank, overhead and all; and the probability that the device does not have them."""
        estimate = memory.estimate_memory(workload, self.device)
        mean, variance = self._belief(workload)
        likely = estimate.allocated * exp(mean) + estimate.overhead
        return likely, _normal((mean - log(self._room(estimate) / estimate.allocated)) / sqrt(variance))

    def _room(self, estimate: memory.MemoryEstimate) -> float:
        """Bytes that a device has for tensors."""
        return max(1.0, self.device.memory_bytes - estimate.overhead)

    def _row(self, workload: Workload) -> Array:
        row = np.zeros_like(self._mean)
        row[[0, self._places.get(workload, 0)]] = 1.0
        return row

    def _belief(self, workload: Workload) -> tuple[float, float]:
        row = self._row(workload)
        variance = float(row @ self._covariance @ row)
        return float(row @ self._mean), variance + (0.0 if workload in self._places else _OWN)

    def _observe(self, workload: Workload, value: float, variance: float) -> None:
        """A layout's ratio takes this mean and variance, and what is correlated with it moves along."""
        row = self._row(workload)
        was_mean, was = self._belief(workload)
        gain = self._covariance @ row / was
        self._mean = self._mean + gain * (value - was_mean)
        self._covariance = self._covariance - np.outer(gain, gain) * (was - max(variance, REPEAT**2))

    def _exceed(self, workload: Workload, least: float) -> None:
        """It was more, or memory ran out for a reason of its own: the moments of the two together.

        The first is a normal distribution cut off below (assumed-density filtering, Minka 2001).
        """
        mean, variance = self._belief(workload)
        deviation = sqrt(variance)
        cut = (least - mean) / deviation
        beyond = _normal(-cut)
        hazard = _density(cut) / max(beyond, _TINY)
        true = beyond / (beyond + UNSEEN)
        moved = deviation * hazard
        left = true * variance * (1 - hazard * (hazard - cut)) + (1 - true) * variance + true * (1 - true) * moved**2
        self._observe(workload, mean + true * moved, left)


def next_run(belief: Belief, p_out: Sequence[float], open_: Sequence[int]) -> int:
    """Of the steps `open_`, the one whose measuring lessens most what the layout then chosen is expected to lose.

    The knowledge gradient for correlated normal beliefs (Frazier, Powell and Dayanik 2009, equation 14): a measured
    step moves every mean along its column of the covariance, by a standard normal factor; E[min] is in closed form.
    What runs out of memory, by `p_out`, is not timed.
    """

    def value(index: int) -> float:
        column = belief.covariance[:, index]
        moves = column / sqrt(column[index] + REPEAT**2)
        return (1 - p_out[index]) * (expected_maximum(-belief.mean, moves) - float(np.max(-belief.mean)))

    return max(open_, key=lambda index: (value(index), -belief.mean[index]))


def expected_maximum(starts: Array, slopes: Array) -> float:
    """E[max_i(starts_i + slopes_i Z)] of a standard normal Z, by the lines' upper envelope (ibid., algorithm 1)."""
    order = np.lexsort((starts, slopes))
    lines: list[tuple[float, float]] = []
    crossings: list[float] = []
    for start, slope in zip(starts[order], slopes[order], strict=True):
        if lines and slope - lines[-1][1] < 1e-12:
            lines.pop()
            crossings = crossings[: max(0, len(lines) - 1)]
        while lines:
            crossing = (lines[-1][0] - start) / (slope - lines[-1][1])
            if not crossings or crossing > crossings[-1]:
                crossings.append(crossing)
                break
            lines.pop()
            crossings.pop()
        lines.append((float(start), float(slope)))
    ends = [-np.inf, *crossings, np.inf]
    return sum(
        start * (_normal(high) - _normal(low)) + slope * (_density(low) - _density(high))
        for (start, slope), low, high in zip(lines, ends, ends[1:], strict=False)
    )


def settled(belief: Belief, best: int) -> bool:
    """Whether no step is likely to be shorter than that of `best` by more than repeats of one layout differ."""
    means, deviations = belief.against(best)
    return bool(np.all(means - INTERVAL * deviations >= -NOISE))


def _nearness(rows: Sequence[Workload], columns: Sequence[Workload]) -> Array:
    """Covariance of layouts' own errors, [rows, columns]."""
    distance, fitted = apart(rows, columns), FITTED["left_over"]
    near: Array = fitted["shared"] ** 2 * np.exp(-distance / fitted["reach"]) + fitted["own"] ** 2 * (distance == 0)
    return near


def apart(rows: Sequence[Workload], columns: Sequence[Workload]) -> Array:
    """Distance of steps, [rows, columns]: one for each doubling of a size, and for each kind in which they differ."""
    if not rows or not columns:
        return np.zeros((len(rows), len(columns)))
    sizes = [np.array([_sizes(each) for each in steps]) for steps in (rows, columns)]
    kinds = [[_kinds(each) for each in steps] for steps in (rows, columns)]
    unlike = [[sum(map(operator.ne, one, other)) for other in kinds[1]] for one in kinds[0]]
    distance: Array = np.abs(sizes[0][:, None, :] - sizes[1][None, :, :]).sum(-1) + np.array(unlike)
    return distance


@lru_cache(maxsize=1 << 12)
def _sizes(workload: Workload) -> tuple[float, ...]:
    """In doublings: degrees of parallelism, the micro-batch, the model, the sequence."""
    layout, model = workload.layout, workload.model
    degrees = (layout.tp, layout.cp, layout.pp, layout.vpp, layout.dp, layout.ep, layout.etp)
    return tuple(
        log(size, 2)
        for size in (
            *degrees,
            workload.micro_batch,
            model.layers,
            model.hidden,
            model.active_parameters,
            workload.sequence_length,
            workload.global_batch,
        )
    )


def _kinds(workload: Workload) -> tuple[object, ...]:
    """What is alike or is not."""
    return (
        workload.recompute,
        workload.precision,
        workload.attention_kernel,
        workload.fused_norm,
        workload.zero_stage,
        workload.load,
        workload.dispatcher,
        workload.context_attention,
        workload.swapping,
    )


def _normal(value: float) -> float:
    """Cumulative distribution of the standard normal."""
    return 0.5 * erfc(-value / sqrt(2))


def _density(value: float) -> float:
    return exp(-(value**2) / 2) / sqrt(2 * pi)
