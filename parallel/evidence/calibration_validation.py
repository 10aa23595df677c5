"""`python -m parallel.evidence.calibration_validation TABLE.csv --runs 3`: what a few measured rows say of the others.

In each group of comparable rows of one software on one device, rows are measured one after another as next_run chooses
them. Printed before the first and after each, of the rows not measured: the mean and largest error and the median bias,
the share within their interval of nine in ten, and the interval's mean half width; and the regret of the layout that is
then believed fastest. `--profile` names a profile of the machine's own in place of the shipped one.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.errors import InputError
from parallel.estimates.hardware import Hardware, hardware
from parallel.estimates.workload import Workload
from parallel.evidence.calibration import Calibration, Observation, next_run
from parallel.evidence.published import Row, UnpricedError, read

LEAST_GROUP = 10


@dataclass(frozen=True)
class Standing:
    """After some runs of a group: figures of the rows that were not measured, and the regret of the choice."""

    runs: int
    error: float
    worst: float
    bias: float
    within: float
    half_width: float
    """Of an interval, as a share of the step."""
    regret: float


def groups(rows: Sequence[Row], device: Hardware | None) -> dict[str, list[tuple[Workload, Hardware, float]]]:
    """Timed rows that can be priced, by group; on `device`, where one is given, in place of each row's own."""
    found: dict[str, list[tuple[Workload, Hardware, float]]] = defaultdict(list)
    for row in rows:
        group, seconds = row.cells.get("sweep_group"), row.step_seconds
        if group and seconds:
            try:
                found[group].append((row.workload(), device or row.device, seconds))
            except UnpricedError:
                continue
    return {group: steps for group, steps in found.items() if len(steps) >= LEAST_GROUP}


def standings(steps: Sequence[tuple[Workload, Hardware, float]], runs: int) -> Iterator[Standing]:
    """Before the first run and after each."""
    workloads, device = [step for step, _, _ in steps], steps[0][1]
    true = np.log([seconds for _, _, seconds in steps])
    measured: list[int] = []
    for run in range(runs + 1):
        seen = [Observation(workloads[at], steps[at][2]) for at in measured]
        belief = Calibration(device, workloads[0].software, seen).believe(workloads)
        rest = [at for at in range(len(steps)) if at not in measured]
        off = (belief.mean - true)[rest]
        errors = np.abs(np.exp(off) - 1)
        intervals = np.array([belief.interval(at) for at in rest])
        within = (np.log(intervals[:, 0]) <= true[rest]) & (true[rest] <= np.log(intervals[:, 1]))
        yield Standing(
            runs=run,
            error=float(errors.mean()),
            worst=float(errors.max()),
            bias=float(np.exp(np.median(off)) - 1),
            within=float(within.mean()),
            half_width=float(np.mean(np.log(intervals[:, 1] / intervals[:, 0]) / 2)),
            regret=float(np.exp(true[int(np.argmin(belief.mean))] - true.min()) - 1),
        )
        measured.append(next_run(belief, [0.0] * len(steps), rest))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rows measured (default: 3)")
    parser.add_argument("--profile", metavar="FILE", help="a profile of the machine's own")
    given = parser.parse_args(arguments)
    try:
        device = hardware(given.profile, 1) if given.profile else None
        found = groups(list(read(given.table)), device)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'group':<44}{'runs':>5}{'mean':>8}{'worst':>8}{'bias':>8}{'within':>8}{'half':>8}{'regret':>8}")
    for group, steps in sorted(found.items()):
        for each in standings(steps, given.runs):
            figures = (each.error, each.worst, each.bias, each.within, each.half_width, each.regret)
            print(f"{group:<44}{each.runs:>5}" + "".join(f"{figure:>8.1%}" for figure in figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
