"""`python -m parallel.evidence.fitting MEASURED_LAYOUTS OPERATORS --out parallel/estimates/fitted.json`: fits.

Of a device, how matrix products depend on their shape: on a table of measured operators. Of frameworks, their
residuals: on the rows of a table of measured layouts whose split is `calibrate`, and no others. The search is
deterministic, so that the same tables give the same file.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import Hardware, hardware
from parallel.estimates.operators import product
from parallel.estimates.software import FACTS, Software
from parallel.estimates.workload import Workload
from parallel.evidence.published import Row, UnpricedError, read

RESIDUALS = {
    "compute": (0.9, 1.6),
    "memory": (0.6, 5.0),
    "launch": (0.5, 8.0),
    "network": (1.0, 2.0),
    "data": (1.0, 20.0),
}
"""Fields of Software that are fitted, and their bounds: no collective is quicker within a step than alone, and products
are no quicker than those of the profile, but for the tenth by which an A100 on SXM exceeds one on PCIe (NVIDIA's
datasheet: 90% of its performance)."""

STEP_SECONDS = (0.0, 0.1)
"""Bounds of the time that a step takes whatever its size: each framework's own."""

PRODUCTS = {"bf16_flops": (0.3, 1.0), "half_depth": (1.0, 400.0), "tile_128": (0.5, 1.0), "tile_64": (0.3, 1.0)}
"""Fields of Hardware that are fitted, and their bounds: the first as a share of the peak."""

DEVICES = {"A100 PCIe": "a100_80gb", "B200 SXM": "b200"}
"""Of the table of operators, and the profile of its processor."""

NOISE = 0.028
"""Steps of one configuration measured twice differ by up to this (BLOOM's topology search): smaller errors weigh as
squares, larger ones as themselves, so that a run that had a slow node bends little."""

BELIEF = 0.5
"""Standard deviation of a parameter's logarithm before anything is measured: kernels of one kind by several frameworks
differ by up to a factor of 2."""

MOST_STEPS = 40
DIFFERENCE = 1e-3
"""Of a parameter, over which the errors' slopes are taken."""

Point = dict[str, float]
Bounds = Mapping[str, tuple[float, float]]
Vector = NDArray[np.float64]
Step = tuple[Workload, Hardware, float]
"""What ran, on which device, and the seconds measured."""


def fit(errors: Callable[[Point], Vector], start: Point, bounds: Bounds) -> Point:
    """What makes `errors`, logarithms of ratios, small: from `start`, and drawn to it where they say nothing.

    Levenberg-Marquardt (Marquardt 1963) on squares weighted anew at each step (Holland and Welsch 1977), which is
    Huber's loss with its bend at NOISE; the Jacobian is of finite differences. A parameter that starts above 0 moves
    by its logarithm; one that starts at 0 by shares of its upper bound. Bounds hold by projection.
    """
    names = list(bounds)
    coded = _Code(np.array([start[name] for name in names]), np.array([bounds[name] for name in names]))
    origin, low, high = coded.origin, coded.low, coded.high

    def point(at: Vector) -> Point:
        return dict(zip(names, map(float, coded.values(at)), strict=True))

    def loss(found: Vector, at: Vector) -> float:
        size = np.abs(found)
        huber = np.where(size < NOISE, size**2 / (2 * NOISE), size - NOISE / 2)
        return float(huber.sum() / NOISE + ((at - origin) ** 2).sum() / (2 * BELIEF**2))

    at, damping = np.clip(origin, low, high), 1e-3
    found = errors(point(at))
    least = loss(found, at)
    for _ in range(MOST_STEPS):
        columns = []
        for index in range(len(names)):
            aside = at.copy()
            aside[index] += DIFFERENCE if at[index] + DIFFERENCE <= high[index] else -DIFFERENCE
            columns.append((errors(point(aside)) - found) / (aside[index] - at[index]))
        jacobian = np.stack(columns, axis=1)
        weights = 1 / np.maximum(np.abs(found), NOISE) / NOISE
        curvature = jacobian.T @ (weights[:, None] * jacobian) + np.eye(len(names)) / BELIEF**2
        slope = jacobian.T @ (weights * found) + (at - origin) / BELIEF**2
        # What is at a bound and pushed beyond it stays there.
        free = ~(((at <= low) & (slope > 0)) | ((at >= high) & (slope < 0)))
        before = least
        while damping < 1e6 and least == before:
            damped = curvature + damping * np.diag(np.diag(curvature))
            step = np.zeros(len(names))
            step[free] = -np.linalg.solve(damped[np.ix_(free, free)], slope[free])
            tried = np.clip(at + step, low, high)
            value = loss(there := errors(point(tried)), tried)
            if value < least:
                at, found, least = tried, there, value
            damping *= 0.2 if value < before else 5
        if before - least < 1e-5 * before:
            break
    return {name: round(value, 4) for name, value in point(at).items()}


class _Code:
    """Parameters as the search moves them: logarithms, or shares of the upper bound for those that start at 0."""

    def __init__(self, start: Vector, bounds: Vector) -> None:
        self._logarithmic = start > 0
        self._scale = bounds[:, 1]
        self.origin, self.low, self.high = (self._encode(values) for values in (start, bounds[:, 0], bounds[:, 1]))

    def _encode(self, values: Vector) -> Vector:
        return np.where(self._logarithmic, np.log(np.where(self._logarithmic, values, 1.0)), values / self._scale)

    def values(self, at: Vector) -> Vector:
        return np.where(self._logarithmic, np.exp(at), at * self._scale)


def fit_products(operators: Sequence[dict[str, str]], device: str) -> Point:
    """How large products run and what shape costs them, of the products of a device that write 16 bits."""
    profile = hardware(DEVICES[device], 8)
    peak = profile.peak_bf16_flops or 1.0
    shapes = []
    for row in operators:
        if row["hardware"] == device and row["op"] == "matmul" and "accumulate=False" in row["shape"]:
            sizes = dict(re.findall(r"\b([mnk])=(\d+)", row["shape"]))
            shapes.append((int(sizes["m"]), int(sizes["n"]), int(sizes["k"]), float(row["efficiency"])))

    def errors(point: Point) -> Vector:
        changes: dict[str, Any] = {**point, "bf16_flops": point["bf16_flops"] * peak}
        tried = replace(profile, **changes)
        return np.array([np.log(_reached(tried, m, n, k) / peak / share) for m, n, k, share in shapes])

    return fit(errors, {"bf16_flops": 0.8, "half_depth": 150.0, "tile_128": 0.9, "tile_64": 0.7}, PRODUCTS)


def _reached(tried: Hardware, m: int, n: int, k: int) -> float:
    return 2.0 * m * n * k / product.__wrapped__(tried, "bf16", m, n, k)


SHARED = "shared"


def fit_residuals(steps: Mapping[str, Sequence[Step]]) -> dict[str, Point]:
    """Residuals of each framework of `steps`, and those that they share: partial pooling (Gelman and Hill 2007, 12).

    A residual is what all frameworks share times what is the framework's own; both are drawn to 1. So what its own
    steps do not tell is as with the others, and one that was not measured gets what is shared.
    """
    start, bounds = {}, {}
    for field, limits in RESIDUALS.items():
        start[f"{SHARED}/{field}"], bounds[f"{SHARED}/{field}"] = 1.0, limits
        for name in steps:
            start[f"{name}/{field}"], bounds[f"{name}/{field}"] = 1.0, (limits[0] / limits[1], limits[1] / limits[0])
    for name in steps:
        start[f"{name}/step_seconds"], bounds[f"{name}/step_seconds"] = 0.0, STEP_SECONDS
    known: dict[str, tuple[Point, Vector]] = {}

    def errors(point: Point) -> Vector:
        for name, measured in steps.items():
            own = _residuals(point, name)
            if name not in known or known[name][0] != own:
                known[name] = own, step_errors(measured, with_residuals(name, own))
        return np.concatenate([known[name][1] for name in steps])

    found = fit(errors, start, bounds)
    shared = {field: round(found[f"{SHARED}/{field}"], 4) for field in RESIDUALS}
    return {SHARED: shared} | {name: _residuals(found, name) for name in steps}


def _residuals(point: Point, name: str) -> Point:
    own = {
        field: round(float(np.clip(point[f"{SHARED}/{field}"] * point[f"{name}/{field}"], *limits)), 6)
        for field, limits in RESIDUALS.items()
    }
    return own | {"step_seconds": point[f"{name}/step_seconds"]}


def with_residuals(name: str, residuals: Point) -> Software:
    """A framework's facts, and these residuals."""
    changes: dict[str, Any] = dict(residuals)
    return replace(FACTS[name], **changes)


def step_errors(steps: Sequence[Step], software: Software) -> Vector:
    """Logarithms of predicted over measured seconds."""
    return np.array([np.log(estimate_time(step, device, software).total / seconds) for step, device, seconds in steps])


def spread(errors: Vector) -> float:
    """The factor within which nine of ten lie."""
    return round(float(np.exp(np.quantile(np.abs(errors), 0.9))), 3)


def calibration(rows: Sequence[Row], name: str) -> list[Step]:
    """The measured steps of a framework that may be fitted on."""
    found = []
    for row in rows:
        seconds = row.step_seconds
        if row.cells["split"] == "calibrate" and row.software == name and seconds:
            try:
                found.append((row.workload(), row.device, seconds))
            except UnpricedError:  # it is not priced in validation either
                continue
    return found


def left_out(steps: Mapping[str, Sequence[Step]]) -> Vector:
    """Errors of each framework's steps by what the others share: those of one that was not measured."""
    found = []
    for name, measured in steps.items():
        shared = fit_residuals({other: steps[other] for other in steps if other != name})[SHARED]
        found.append(step_errors(measured, with_residuals(name, shared)))
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layouts", type=Path)
    parser.add_argument("operators", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with given.operators.open(newline="", encoding="utf-8") as file:
        operators = list(csv.DictReader(file))
    rows = list(read(given.layouts))
    steps = {name: measured for name in FACTS if (measured := calibration(rows, name))}
    residuals = fit_residuals(steps)
    spreads = {
        name: spread(step_errors(measured, with_residuals(name, residuals[name]))) for name, measured in steps.items()
    }
    fitted = {
        "products": {DEVICES[device]: fit_products(operators, device) for device in DEVICES},
        "software": residuals,
        "spread": {SHARED: spread(left_out(steps))} | spreads,
    }
    given.out.write_text(json.dumps(fitted, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
