"""`python -m parallel.validation TABLE.csv --out predictions.csv`: the planner's predictions beside measurements.

Rows are priced by the same functions as plans. Printed by source and split: the mean and median error and the median
bias of step times; in groups of comparable rows the regret of the layout that is predicted to be fastest, how often the
best is among the first three, and the rank correlation (Spearman's); the same errors of allocated memory; and of rows
that say whether they ran the share that is told right, of those that ran out of memory the share missed, and of those
that ran the share refused.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jobs.errors import InputError
from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import GIB
from parallel.estimates.memory import LIKELY_OUT, MemoryEstimate, estimate_memory
from parallel.estimates.software import spread
from parallel.estimates.workload import Workload
from parallel.evidence.published import Row, UnpricedError, read
from parallel.layout import divisors

FIELDS = (
    "row_id",
    "predicted_step_seconds",
    "predicted_tflops_per_gpu",
    "predicted_memory_bytes",
    "p_out_of_memory",
    "step_seconds_low",
    "step_seconds_high",
    "reason",
)
ERRORS = f"{'mean':>8}{'median':>8}{'bias':>8}{'worst':>8}"
LEAST_GROUP = 10
"""Rows of a group that is ranked."""

RECOMPUTED = (
    frozenset[str](),
    frozenset({"layernorm", "moe_act", "mla_up_proj"}),
    frozenset({"layernorm", "moe_act", "mla_up_proj", "mlp"}),
    frozenset({"layer"}),
)
"""What a row that does not say it may compute again: nothing, the cheaper or all of the modules that Megatron-Bridge's
recipes name, or whole layers."""


@dataclass(frozen=True)
class Prediction:
    """Of one row; `step_seconds` is None where it could not be priced, and `reason` says why."""

    row: Row
    step_seconds: float | None = None
    tflops: float | None = None
    memory: MemoryEstimate | None = None
    p_out_of_memory: float | None = None
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """Predicted over measured seconds of a step, or measured over predicted FLOP/s where the row has no others."""
        if self.step_seconds is None:
            return None
        if seconds := self.row.step_seconds:
            return self.step_seconds / seconds
        measured = self.row.tflops
        return measured / self.tflops if measured and self.tflops else None

    @property
    def refused(self) -> bool:
        """As a plan would be."""
        return self.p_out_of_memory is not None and self.p_out_of_memory > LIKELY_OUT

    @property
    def memory_error(self) -> float | None:
        """Of what is allocated, as a share; None where the row has no amount, or that of a step cut short."""
        measured = self.row.number("mem_gb")
        if not measured or self.memory is None or self.row.ran_out:
            return None
        return self.memory.allocated / (measured * GIB) - 1


def predict(row: Row) -> Prediction:
    """What the planner says of a row; of what the row leaves open, the fastest that is likely to fit, as plans have it.

    Where none is likely to fit, of the fastest.
    """
    try:
        device = row.device
        steps = [(step, estimate_memory(step, device)) for step in candidates(row)]
    except UnpricedError as error:
        return Prediction(row, reason=str(error))
    fitting = [pair for pair in steps if pair[1].p_out_of_memory(device.memory_bytes) <= LIKELY_OUT]
    priced = [(estimate_time(step, device).total, step, memory) for step, memory in fitting or steps]
    seconds, step, memory = min(priced, key=lambda each: each[0])
    flops = row.flops_per_token(step) * step.global_batch * step.sequence_length
    tflops = flops / seconds / step.layout.world / 1e12
    p_out = memory.p_out_of_memory(device.memory_bytes)
    return Prediction(row, seconds, tflops, memory, p_out, device.notice)


def candidates(row: Row) -> list[Workload]:
    """The step that the row tells of; several where it leaves micro-batch, recomputation or virtual stages open.

    May raise UnpricedError.
    """
    found, refused = [], None
    for micro_batch in (None,) if row.cells["mbs"] else (1, 2, 4, 8):
        try:
            found.append(row.workload(micro_batch))
        except UnpricedError as error:
            refused = refused or error
    if not found and refused:
        raise refused
    if row.recompute is None:
        found = [replace(step, recompute=modules) for step in found for modules in RECOMPUTED]
    if row.cells["vpp"]:
        return found
    return [replace(step, layout=replace(step.layout, vpp=vpp)) for step in found for vpp in _virtual_stages(step)]


def _virtual_stages(step: Workload) -> tuple[int, ...]:
    """That the engine accepts: of equal layers, with micro-batches in whole groups of pp."""
    layout, layers = step.layout, step.model.layers
    if layout.pp == 1 or step.micro_batches % layout.pp or layers % layout.pp:
        return (layout.vpp,)
    return divisors(layers // layout.pp)


def write(predictions: Iterable[Prediction], path: Path) -> None:
    """One line a row, in the order of the table; what is not predicted is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for each in predictions:
            line: dict[str, object] = {"row_id": each.row.row_id, "reason": each.reason}
            if each.step_seconds is not None and each.memory is not None:
                line["predicted_memory_bytes"] = each.memory.total
                line["p_out_of_memory"] = f"{each.p_out_of_memory:.4f}"
                line["predicted_step_seconds"] = f"{each.step_seconds:.6g}"
                line["predicted_tflops_per_gpu"] = f"{each.tflops:.5g}"
                factor = spread(each.row.software)
                line["step_seconds_low"] = f"{each.step_seconds / factor:.6g}"
                line["step_seconds_high"] = f"{each.step_seconds * factor:.6g}"
            writer.writerow(line)


@dataclass(frozen=True)
class Ranking:
    """Of a group of comparable rows: what the layout chosen loses against the best, its place, and the correlation."""

    regret: float
    place: int
    correlation: float


def rank(predicted: Sequence[float], measured: Sequence[float]) -> Ranking:
    """Seconds predicted and measured of each layout. `place` is where the best layout stands among the predicted."""
    order = np.argsort(predicted, kind="stable")
    best = int(np.argmin(measured))
    places = [np.argsort(np.argsort(seconds, kind="stable")).astype(float) for seconds in (predicted, measured)]
    return Ranking(
        regret=float(measured[int(order[0])] / measured[best] - 1),
        place=int(np.flatnonzero(order == best)[0]) + 1,
        correlation=float(np.corrcoef(places[0], places[1])[0, 1]),
    )


def accuracy(found: Sequence[Prediction]) -> tuple[float, float, float]:
    """Shares of rows that say whether they ran: right of all, missed of those out of memory, refused of those that ran.

    0 of none.
    """
    right = [each.refused == each.row.ran_out for each in found]
    missed = [not each.refused for each in found if each.row.ran_out]
    refused = [each.refused for each in found if not each.row.ran_out]
    shares = [float(np.mean(each)) if each else 0.0 for each in (right, missed, refused)]
    return shares[0], shares[1], shares[2]


def summary(predictions: Sequence[Prediction]) -> list[str]:
    """Lines of text: steps by source and split, then groups, then memory."""
    lines = [f"{'source':<24}{'split':<10}{'rows':>5}{'priced':>7}{ERRORS}"]
    by_source: dict[tuple[str, str], list[Prediction]] = defaultdict(list)
    by_group: dict[str, list[Prediction]] = defaultdict(list)
    for each in predictions:
        by_source[each.row.source].append(each)
        if (group := each.row.cells.get("sweep_group")) and each.ratio and each.row.step_seconds:
            by_group[group].append(each)
    for (source, split), found in sorted(by_source.items()):
        head = f"{source:<24}{split:<10}{len(found):>5}{sum(each.step_seconds is not None for each in found):>7}"
        lines.append(head + _figures([each.ratio - 1 for each in found if each.ratio]))
    rankings: dict[tuple[str, str], list[Ranking]] = defaultdict(list)
    for found in by_group.values():
        if len(found) >= LEAST_GROUP:
            ranked = rank([e.step_seconds or 0.0 for e in found], [e.row.step_seconds or 0.0 for e in found])
            rankings[found[0].row.source].append(ranked)
    lines.append(f"{'ranking':<24}{'split':<10}{'groups':>7}{'regret':>8}{'worst':>8}{'top 3':>7}{'rank':>7}")
    for (source, split), each_group in sorted(rankings.items()):
        regrets = [ranked.regret for ranked in each_group]
        within = sum(ranked.place <= 3 for ranked in each_group) / len(each_group)
        correlation = float(np.mean([ranked.correlation for ranked in each_group]))
        lines.append(
            f"{source:<24}{split:<10}{len(each_group):>7}{np.mean(regrets):>8.1%}{max(regrets):>8.1%}"
            f"{within:>7.0%}{correlation:>7.2f}"
        )
    lines.append(f"{'memory':<24}{'split':<10}{'rows':>12}{ERRORS}")
    for (source, split), found in sorted(by_source.items()):
        if errors := [error for each in found if (error := each.memory_error) is not None]:
            lines.append(f"{source:<24}{split:<10}{len(errors):>12}{_figures(errors)}")
    lines.append(f"{'out of memory':<24}{'split':<10}{'rows':>12}{'right':>8}{'missed':>8}{'refused':>8}")
    for (source, split), found in sorted(by_source.items()):
        if told := [each for each in found if each.memory and each.row.ran_out is not None]:
            shares = "".join(f"{share:>8.1%}" for share in accuracy(told))
            lines.append(f"{source:<24}{split:<10}{len(told):>12}{shares}")
    return lines


def _figures(errors: Sequence[float]) -> str:
    if not errors:
        return ""
    absolute = np.abs(errors)
    figures = (absolute.mean(), np.median(absolute), np.median(errors), absolute.max())
    return "".join(f"{value:>8.1%}" for value in figures)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    try:
        predictions = [predict(row) for row in read(given.table)]
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if given.out:
        write(predictions, given.out)
    print("\n".join(summary(predictions)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
