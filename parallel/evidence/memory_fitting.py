"""`python -m parallel.evidence.memory_fitting TABLE.csv --out FILE`: parallel/estimates/memory_fitted.json again.

Of split `calibrate` alone, and of the sources that have both outcomes: parameters on a grid, weighted by how likely
they make the outcomes. A row in fifty is taken to fail, or to run, for a reason that no estimate sees.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

from parallel.estimates.hardware import Hardware
from parallel.estimates.memory import FITTED, estimate_memory
from parallel.estimates.workload import Workload
from parallel.evidence.published import Row, UnpricedError, read

GRID = {
    "whole_logit_bytes": [float(size) for size in range(10, 25, 2)],
    "slack": [share / 50 for share in range(21)],
    "spread_passing": [share / 50 for share in range(1, 16)],
    "spread_held": [share / 100 for share in range(1, 16)],
}
"""Of a logit, at least what forward has at once, and at most all that the loss makes of it: in 16 bits each rank's
share gathered, all of them joined, their gradient and a share of it; in fp32 a copy, its log-probabilities, and their
gradients."""

UNSEEN = 0.02


@dataclass(frozen=True)
class Outcome:
    """One row that says what became of its memory."""

    source: str
    workload: Workload
    device: Hardware
    ran_out: bool


def outcomes(rows: Iterable[Row]) -> list[Outcome]:
    """Of the rows that may be fitted on, say whether they ran, and leave nothing open; of sources that have both."""
    found = []
    for row in rows:
        source, split = row.source
        if split == "calibrate" and row.ran_out is not None and row.cells["mbs"]:
            try:
                found.append(Outcome(source, row.workload(), row.device, row.ran_out))
            except UnpricedError:  # it is not priced in validation either
                continue
    both = {each.source for each in found if each.ran_out}
    return [each for each in found if each.source in both]


def fit(found: Sequence[Outcome]) -> dict[str, float]:
    """The mean of the grid's parameters, weighted by how likely they make the outcomes: the most likely ones are chance
    where outcomes tell many apart as little as these do."""
    given, weighted = dict(FITTED), []
    for size, slack in itertools.product(GRID["whole_logit_bytes"], GRID["slack"]):
        FITTED.update(whole_logit_bytes=size, slack=slack)
        estimates = [estimate_memory(each.workload, each.device) for each in found]
        for passing, held in itertools.product(GRID["spread_passing"], GRID["spread_held"]):
            FITTED.update(spread_passing=passing, spread_held=held)
            likelihood = 0.0
            for each, estimate in zip(found, estimates, strict=True):
                out = UNSEEN / 2 + (1 - UNSEEN) * estimate.p_out_of_memory(each.device.memory_bytes)
                likelihood += log(out if each.ran_out else 1 - out)
            weighted.append((likelihood, dict(FITTED)))
    FITTED.update(given)
    best = max(likelihood for likelihood, _ in weighted)
    weights = [exp(likelihood - best) for likelihood, _ in weighted]
    return {
        name: round(sum(w * point[name] for w, (_, point) in zip(weights, weighted, strict=True)) / sum(weights), 3)
        for name in sorted(given)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    fitted = fit(outcomes(read(given.table)))
    given.out.write_text(json.dumps(fitted, indent=2) + "\n", encoding="utf-8")
    print(fitted)


if __name__ == "__main__":
    main()
