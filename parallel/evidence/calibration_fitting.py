"""`python -m parallel.evidence.calibration_fitting MEASURED_LAYOUTS --out FILE`: calibration_fitted.json again.

What a calibration believes before its first run, of the rows whose split is `calibrate` alone: how far the residuals of
one version of a framework lie from another's, and what fitted residuals leave of a step's error, which near layouts
share.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from parallel.estimates.software import FACTS, Software, software
from parallel.evidence import fitting
from parallel.evidence.calibration import LEAST, REPEAT, Array, apart
from parallel.evidence.published import read

GRID = {
    "shared": [step / 100 for step in range(1, 31)],
    "reach": [0.5 * 1.25**power for power in range(16)],
    "own": [step / 100 for step in range(11)],
}
"""Of what is left over: what is tried."""

RESIDUALS = (*fitting.RESIDUALS, "step_seconds")


def between(versions: Sequence[Software]) -> dict[str, float]:
    """Standard deviations of residuals from one version to another, of logarithms but for step_seconds."""
    spread = {name: float(np.std(_of(versions, name), ddof=1)) for name in RESIDUALS}
    return {name: round(max(value, LEAST.get(name, 0.0)), 4) for name, value in spread.items()}


def _of(versions: Sequence[Software], name: str) -> Array:
    values = np.array([getattr(version, name) for version in versions])
    return values if name == "step_seconds" else np.log(values)


def left_over(steps: Mapping[str, Sequence[fitting.Step]]) -> dict[str, float]:
    """The likeliest covariance of what fitted residuals leave, of a grid.

    Likely are the differences of each two steps of a version (Curriero and Lele 1999, composite likelihood): the whole
    process's likelihood is ruled by its nearest steps, and takes far ones for much less alike than they are.
    """
    differences, distances = [], []
    for name, measured in steps.items():
        errors, workloads = fitting.step_errors(measured, software(name)), [step for step, _, _ in measured]
        pairs = np.triu_indices(len(errors), 1)
        differences.append((errors[pairs[0]] - errors[pairs[1]]) ** 2)
        distances.append(apart(workloads, workloads)[pairs])
    distance, place, number = np.unique(np.concatenate(distances), return_inverse=True, return_counts=True)
    squares = np.bincount(place, np.concatenate(differences))

    def unlikelihood(shared: float, reach: float, own: float) -> float:
        half = shared**2 * (1 - np.exp(-distance / reach)) + own**2 * (distance > 0) + REPEAT**2
        return float((squares / (4 * half) + number * np.log(half) / 2).sum())

    likeliest = min(itertools.product(*GRID.values()), key=lambda point: unlikelihood(*point))
    return dict(zip(GRID, (round(value, 4) for value in likeliest), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layouts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = list(read(given.layouts))
    steps = {name: measured for name in FACTS if (measured := fitting.calibration(rows, name))}
    versions = [software(name) for name in steps]
    fitted = {"between": between(versions), "left_over": left_over(steps)}
    given.out.write_text(json.dumps(fitted, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(fitted))


if __name__ == "__main__":
    main()
