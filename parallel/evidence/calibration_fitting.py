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

from parallel.estimates.software import FACTS, Software, software
from parallel.evidence import fitting
from parallel.evidence.calibration import LEAST, REPEAT, apart
from parallel.evidence.published import read

FIELDS = (*fitting.RESIDUALS, "step_seconds")

GRID = {
    "shared": [share / 100 for share in range(2, 41, 2)],
    "reach": [reach / 2 for reach in range(2, 41)],
    "own": [share / 100 for share in range(11)],
}
"""Of what is left over."""


def between(versions: Sequence[Software]) -> dict[str, float]:
    """Standard deviations of versions' residuals from what they share, of logarithms but for step_seconds."""
    found = {}
    for name in FIELDS:
        center, values = getattr(software(""), name), np.array([getattr(version, name) for version in versions])
        off = values - center if name == "step_seconds" else np.log(values / center)
        found[name] = round(max(float(np.sqrt(np.mean(off**2))), LEAST.get(name, 0.0)), 4)
    return found


def left_over(steps: Mapping[str, Sequence[fitting.Step]]) -> dict[str, float]:
    """The likeliest covariance, of a grid, of what fitted residuals leave.

    Its deviation is larger than that of the errors: what all layouts of a version share, the residuals have taken.
    """
    parts = []
    for name, measured in steps.items():
        workloads = [step for step, _, _ in measured]
        parts.append((fitting.step_errors(measured, software(name)), apart(workloads, workloads)))

    def unlikelihood(point: fitting.Point) -> float:
        total = 0.0
        for errors, distance in parts:
            near = point["shared"] ** 2 * np.exp(-distance / point["reach"]) + point["own"] ** 2 * (distance == 0)
            factor = np.linalg.cholesky(near + REPEAT**2 * np.eye(len(errors)))
            total += np.log(np.diag(factor)).sum() + (np.linalg.solve(factor, errors) ** 2).sum() / 2
        return float(total)

    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    return min(points, key=unlikelihood)


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
