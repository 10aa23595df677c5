"""`python -m parallel.evidence.memory_validation TABLE.csv`: memory predicted beside measured, and what ran out.

Printed by source and split: of rows with an amount, the mean, median and largest error and the median bias of what is
allocated; of sources with rows that ran out of memory, the share of outcomes that is right, of those out of memory the
share missed, and of those that ran the share refused.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parallel.estimates.hardware import GIB, Hardware
from parallel.estimates.memory import LIKELY_OUT, MemoryEstimate, estimate_memory
from parallel.estimates.workload import Workload
from parallel.evidence.published import Row, UnpricedError, read

RAN, OUT = "ok", "oom"
"""How a row's status begins."""


@dataclass(frozen=True)
class Outcome:
    """One row that says what became of its memory."""

    row: Row
    workload: Workload
    device: Hardware
    memory: MemoryEstimate

    @property
    def ran_out(self) -> bool:
        return self.row.cells["status"].startswith(OUT)

    @property
    def refused(self) -> bool:
        return self.memory.p_out_of_memory(self.device.memory_bytes) > LIKELY_OUT

    @property
    def error(self) -> float | None:
        """Of what is allocated, as a share; None where the row has no amount."""
        measured = self.row.number("mem_gb")
        return self.memory.allocated / (measured * GIB) - 1 if measured else None


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """Of the rows that ran or ran out of memory, those that can be priced."""
    found = []
    for row in rows:
        if not row.cells.get("status", "").startswith((RAN, OUT)) or not row.cells["mbs"]:
            continue
        try:
            workload, device = row.workload(), row.device
        except UnpricedError:
            continue
        found.append(Outcome(row, workload, device, estimate_memory(workload, device)))
    return found


def accuracy(found: Sequence[Outcome]) -> tuple[float, float, float]:
    """Shares: right of all, missed of those out of memory, refused of those that ran."""
    right = [each.refused == each.ran_out for each in found]
    missed = [not each.refused for each in found if each.ran_out]
    refused = [each.refused for each in found if not each.ran_out]
    return tuple(float(np.mean(shares)) if shares else 0.0 for shares in (right, missed, refused))  # type: ignore[return-value]


def summary(found: Sequence[Outcome]) -> list[str]:
    """Lines of text: amounts, then outcomes."""
    by_source: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for each in found:
        by_source[each.row.cells["source_id"], each.row.cells["split"]].append(each)
    lines = [f"{'memory':<24}{'split':<10}{'rows':>5}{'mean':>8}{'median':>8}{'bias':>8}{'worst':>8}"]
    for (source, split), group in sorted(by_source.items()):
        errors = np.array([each.error for each in group if each.error is not None and not each.ran_out])
        if len(errors):
            absolute = np.abs(errors)
            figures = (absolute.mean(), np.median(absolute), np.median(errors), absolute.max())
            lines.append(f"{source:<24}{split:<10}{len(errors):>5}" + "".join(f"{value:>8.1%}" for value in figures))
    lines.append(f"{'out of memory':<24}{'split':<10}{'rows':>5}{'right':>8}{'missed':>8}{'refused':>8}")
    for (source, split), group in sorted(by_source.items()):
        shares = "".join(f"{value:>8.1%}" for value in accuracy(group))
        lines.append(f"{source:<24}{split:<10}{len(group):>5}{shares}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    print("\n".join(summary(outcomes(list(read(parser.parse_args().table))))))


if __name__ == "__main__":
    main()
