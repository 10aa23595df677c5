"""`python -m parallel.evidence.calibration_fitting MEASURED_LAYOUTS --out FILE`: calibration_fitted.json again.

What a calibration believes before its first run, of the rows whose split is `calibrate` alone: how far the residuals of
one version of a framework lie from another's, and what fitted residuals leave of a step's error, which near layouts
share. The likelihood is that of a Gaussian process (Rasmussen and Williams 2006, equation 2.30).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import Hardware
from parallel.estimates.software import FACTS, Software, software
from parallel.estimates.workload import Workload
from parallel.evidence import fitting
from parallel.evidence.calibration import LEAST, REPEAT, Array, apart
from parallel.evidence.published import read

GRID = {
    "shared": [step / 50 for step in range(1, 21)],
    "reach": [0.5 * 1.5**power for power in range(10)],
    "own": [step / 50 for step in range(11)],
}
"""Of what is left over: what is tried."""

RESIDUALS = (*fitting.RESIDUALS, "step_seconds")

Step = tuple[Workload, Hardware, float]


def between(versions: Sequence[Software]) -> dict[str, float]:
    """Standard deviations of residuals from one version to another, of logarithms but for step_seconds."""
    spread = {name: float(np.std(_of(versions, name), ddof=1)) for name in RESIDUALS}
    return {name: round(max(value, LEAST.get(name, 0.0)), 4) for name, value in spread.items()}


def _of(versions: Sequence[Software], name: str) -> Array:
    values = np.array([getattr(version, name) for version in versions])
    return values if name == "step_seconds" else np.log(values)


def left_over(steps: Mapping[str, Sequence[Step]]) -> dict[str, float]:
    """The likeliest covariance of what fitted residuals leave, of a grid.

    Its deviation is larger than that of the errors: what all layouts of a version share, the residuals have taken.
    """
    parts = []
    for measured in steps.values():
        errors = [np.log(seconds / estimate_time(step, device).total) for step, device, seconds in measured]
        workloads = [step for step, _, _ in measured]
        parts.append((np.array(errors), apart(workloads, workloads)))

    def unlikelihood(shared: float, reach: float, own: float) -> float:
        total = 0.0
        for errors, distance in parts:
            near = shared**2 * np.exp(-distance / reach) + own**2 * (distance == 0)
            factor = np.linalg.cholesky(near + REPEAT**2 * np.eye(len(errors)))
            total += np.log(np.diag(factor)).sum() + (np.linalg.solve(factor, errors) ** 2).sum() / 2
        return total

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
