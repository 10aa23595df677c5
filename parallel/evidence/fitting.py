"""`python -m parallel.evidence.fitting MEASURED_LAYOUTS OPERATORS --out parallel/estimates/fitted.json`: fits.

Of a device, how matrix products depend on their shape: on a table of measured operators. Of a framework's version, its
residuals: on the rows of a table of measured layouts whose split is `calibrate`, and no others. The search is
deterministic, so that the same tables give the same file.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import Hardware, hardware
from parallel.estimates.operators import product
from parallel.estimates.software import FACTS, Software
from parallel.estimates.workload import Workload
from parallel.evidence.published import Row, UnpricedError, read

RESIDUALS = {
    "compute": (0.9, 1.6),
    "memory": (0.8, 5.0),
    "launch": (0.5, 8.0),
    "network": (1.0, 2.0),
    "data": (1.0, 20.0),
    "step_seconds": (0.0, 0.1),
}
"""Fields of Software that are fitted, and their bounds: no collective is quicker within a step than alone, and kernels
are no quicker than those of the profile, but for the tenth by which an SXM board may exceed a PCIe one."""

PRODUCTS = {"bf16_flops": (0.3, 1.0), "half_depth": (0.0, 400.0), "tile_128": (0.5, 1.0), "tile_64": (0.3, 1.0)}
"""Fields of Hardware that are fitted, and their bounds: the first as a share of the peak."""

DEVICES = {"A100 PCIe": "a100_80gb", "B200 SXM": "b200"}
"""Of the table of operators, and the profile of its processor."""

Bounds = dict[str, tuple[float, float]]
Point = dict[str, float]


def descend(loss: Callable[[Point], float], start: Point, bounds: Bounds, finest: float = 0.004) -> Point:
    """Coordinate descent from `start` within `bounds`, by steps that halve from a quarter of each range to `finest`."""
    best, least, step = dict(start), loss(start), 0.25
    while step > finest:
        moved = False
        for name, (low, high) in bounds.items():
            for sign in (1, -1):
                candidate = {**best, name: min(high, max(low, best[name] + sign * step * (high - low)))}
                value = loss(candidate) if candidate != best else least
                if value < least * (1 - 1e-6):
                    best, least, moved = candidate, value, True
        step = step if moved else step / 2
    return {name: round(value, 4) for name, value in best.items()}


def fit_products(operators: Sequence[dict[str, str]], device: str) -> Point:
    """How large products run and what shape costs them, of the products of a device that write 16 bits."""
    profile = hardware(DEVICES[device], 8)
    peak = profile.peak_bf16_flops or 1.0
    shapes = []
    for row in operators:
        if row["hardware"] == device and row["op"] == "matmul" and "accumulate=False" in row["shape"]:
            sizes = dict(re.findall(r"\b([mnk])=(\d+)", row["shape"]))
            shapes.append((int(sizes["m"]), int(sizes["n"]), int(sizes["k"]), float(row["efficiency"])))

    def loss(point: Point) -> float:
        changes: dict[str, Any] = {**point, "bf16_flops": point["bf16_flops"] * peak}
        tried = replace(profile, **changes)
        return float(np.mean([abs(np.log(_reached(tried, m, n, k) / peak / share)) for m, n, k, share in shapes]))

    return descend(loss, {"bf16_flops": 0.8, "half_depth": 50.0, "tile_128": 0.95, "tile_64": 0.8}, PRODUCTS)


def _reached(tried: Hardware, m: int, n: int, k: int) -> float:
    return 2.0 * m * n * k / product.__wrapped__(tried, "bf16", m, n, k)


def fit_residuals(rows: Sequence[tuple[Workload, Hardware, float]], name: str) -> Point:
    """Residuals that lessen the mean error of the steps of `rows`: the step, its device, the seconds measured."""
    facts = FACTS[name]

    def loss(point: Point) -> float:
        tried = _with(facts, point)
        errors = [abs(np.log(estimate_time(step, device, tried).total / seconds)) for step, device, seconds in rows]
        return float(np.mean(errors))

    start = {field: getattr(facts, field) for field in RESIDUALS}
    return descend(loss, start, RESIDUALS)


def _with(facts: Software, point: Point) -> Software:
    changes: dict[str, Any] = dict(point)
    return replace(facts, **changes)


def calibration(rows: Sequence[Row], name: str) -> list[tuple[Workload, Hardware, float]]:
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
    residuals = {name: fit_residuals(measured, name) for name, measured in steps.items()}
    errors = [
        abs(np.log(estimate_time(step, device, _with(FACTS[name], residuals[name])).total / seconds))
        for name, measured in steps.items()
        for step, device, seconds in measured
    ]
    fitted = {
        "products": {DEVICES[device]: fit_products(operators, device) for device in DEVICES},
        "software": residuals,
        "spread": round(float(np.exp(np.quantile(errors, 0.9))), 3),
    }
    given.out.write_text(json.dumps(fitted, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
