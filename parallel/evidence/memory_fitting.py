"""`python -m parallel.evidence.memory_fitting TABLE.csv --out FILE`: parallel/estimates/memory_fitted.json again.

Of split `calibrate` alone, and of the sources that have both outcomes: the parameters on a grid under which outcomes
are most likely. A row in fifty is taken to fail, or to run, for a reason that no estimate sees.
"""

from __future__ import annotations

import argparse
import itertools
import json
from math import log
from pathlib import Path

from parallel.estimates.memory import FITTED, estimate_memory
from parallel.evidence.memory_validation import Outcome, outcomes
from parallel.evidence.published import read

GRID = {
    "whole_logit_bytes": [float(size) for size in range(8, 41, 2)],
    "slack": [share / 100 for share in range(21)],
    "spread": [share / 200 for share in range(4, 61)],
}
UNSEEN = 0.02


def fit(found: list[Outcome]) -> dict[str, float]:
    """The most likely parameters of the grid; of equals the first."""
    best, given = float("-inf"), dict(FITTED)
    chosen = given
    for size, slack in itertools.product(GRID["whole_logit_bytes"], GRID["slack"]):
        FITTED.update(whole_logit_bytes=size, slack=slack)
        estimates = [estimate_memory(each.workload, each.device) for each in found]
        for spread in GRID["spread"]:
            FITTED.update(spread=spread)
            likelihood = 0.0
            for each, estimate in zip(found, estimates, strict=True):
                out = UNSEEN / 2 + (1 - UNSEEN) * estimate.p_out_of_memory(each.device.memory_bytes)
                likelihood += log(out if each.ran_out else 1 - out)
            if likelihood > best:
                best, chosen = likelihood, dict(FITTED)
    FITTED.update(given)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found = [each for each in outcomes(list(read(given.table))) if each.row.cells["split"] == "calibrate"]
    both = {each.row.cells["source_id"] for each in found if each.ran_out}
    fitted = fit([each for each in found if each.row.cells["source_id"] in both])
    given.out.write_text(json.dumps(fitted, indent=2) + "\n", encoding="utf-8")
    print(fitted)


if __name__ == "__main__":
    main()
