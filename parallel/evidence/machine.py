"""From what was timed on a machine to the profile of its devices: every number as the estimates use it.

Numbers are found by the estimates' own formulas, so that a profile gives back the seconds that it was made from: what
is linear in a number by least squares of relative errors, how products depend on their shape by fitting.fit. What was
not measured is taken from the nearest profile that is shipped, and its source says so.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parallel.estimates.hardware import Hardware, Link
from parallel.estimates.network import Network
from parallel.estimates.operators import attention, product
from parallel.estimates.workload import Precision
from parallel.evidence.fitting import PRODUCTS, Point, Vector, fit

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")

Found = dict[str, Any]
"""Values of fields of Hardware."""


@dataclass(frozen=True)
class Sample:
    """Seconds that something took. `sizes` by `what`:

    product, accumulated: m, n, k, groups; attention, attention_backward: sequences, length, heads, width; copy,
    to_device, to_host, host_adam: the bytes that are read and written; all_reduce, all_gather, reduce_scatter,
    all_to_all, send: the bytes before an all-reduce or after an all-gather, and the size of the group; kernel, launch:
    none.
    """

    what: str
    seconds: float
    precision: Precision
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Measured:
    """Of a machine: its samples, what failed and why, and facts that need no clock."""

    samples: Sequence[Sample]
    failed: Mapping[str, str]
    facts: Found
    """Fields of Hardware that are counted, not timed."""

    def of(self, *whats: str) -> list[Sample]:
        return [each for each in self.samples if each.what in whats]


def measured_fields(measured: Measured, nearest: Hardware) -> Found:
    """Every field of Hardware that the samples tell. `nearest` stands for the others."""
    found: Found = dict(measured.facts)
    # What moves memory bounds a product, so it is known before products are fitted.
    for part in (_memory, _shortest, _products, _sums, _attention, _links, _host):
        found |= part(measured, replace(nearest, **found))
    return found


def grouped_rate(measured: Measured, device: Hardware) -> float | None:
    """Rate of grouped products over what the profile predicts of them; None where none was timed."""
    grouped = [each for each in measured.of("product") if each.sizes["groups"] > 1]
    return _rate(grouped, lambda sample: _product_seconds(device, sample)) if grouped else None


def _memory(measured: Measured, device: Hardware) -> Found:
    rates = [each.sizes["bytes"] / each.seconds for each in measured.of("copy")]
    return {"memory_bytes_per_second": float(np.median(rates))} if rates else {}


def _shortest(measured: Measured, device: Hardware) -> Found:
    return {f"{each.what}_seconds": each.seconds for each in measured.of("kernel", "launch")}


def _products(measured: Measured, device: Hardware) -> Found:
    """How the precision that was timed at the most shapes depends on them; the others do as it does."""
    by_precision: dict[Precision, list[Sample]] = defaultdict(list)
    for each in measured.of("product"):
        if each.sizes["groups"] == 1:
            by_precision[each.precision].append(each)
    if not by_precision:
        return {}
    main = max(by_precision, key=lambda precision: len(by_precision[precision]))
    found = _shapes(by_precision.pop(main), device)
    for precision, samples in by_precision.items():
        found[f"{precision}_flops"] = _slowed(samples, replace(device, **found))
    return found


def _slowed(samples: Sequence[Sample], device: Hardware) -> float:
    """Rate of large products of a precision whose shapes cost what the device's others do."""
    rate, fastest = f"{samples[0].precision}_flops", _fastest(samples)
    tried = replace(device, **Found({rate: fastest}))
    return fastest * _rate(samples, lambda sample: _product_seconds(tried, sample))


def _shapes(samples: Sequence[Sample], device: Hardware) -> Found:
    """Rate of large products and what shape costs them."""
    rate, fastest = f"{samples[0].precision}_flops", _fastest(samples)
    # No shape reaches the rate that there is before shape costs anything; half of that is left for what it costs.
    start, bounds = {rate: 1.05, "half_depth": 150.0}, {rate: (0.95, 2.0), "half_depth": PRODUCTS["half_depth"]}
    if device.processors > 1:
        start |= {"tile_128": 0.9, "tile_64": 0.7}
        bounds |= {name: PRODUCTS[name] for name in ("tile_128", "tile_64")}

    def fields(point: Point) -> Found:
        return {**point, rate: point[rate] * fastest}

    def errors(point: Point) -> Vector:
        tried = replace(device, **fields(point))
        return np.array([np.log(_product_seconds(tried, each) / each.seconds) for each in samples])

    return fields(fit(errors, start, bounds))


def _fastest(samples: Sequence[Sample]) -> float:
    return max(_flops(each) / each.seconds for each in samples)


def _sums(measured: Measured, device: Hardware) -> Found:
    """Against the products of the same shapes that write 16 bits."""
    plain = {_shape(each): each.seconds for each in measured.of("product") if each.precision == "bf16"}
    ratios = [plain[shape] / each.seconds for each in measured.of("accumulated") if (shape := _shape(each)) in plain]
    return {"accumulate": min(1.0, float(np.median(ratios)))} if ratios else {}


def _attention(measured: Measured, device: Hardware) -> Found:
    found: Found = {}
    for what in ("attention", "attention_backward"):
        if samples := measured.of(what):
            field = "attention_forward_flops" if what == "attention" else f"{what}_flops"
            rate = _rate(samples, lambda sample: _attention_seconds(device, sample))
            found[field] = getattr(device, field) * rate
    return found


def _links(measured: Measured, device: Hardware) -> Found:
    """Fixed cost of a collective, latency of a hop and bandwidth, of every collective, group and size at once.

    A hop's latency shows where groups differ in size; with one size it stays the nearest profile's. network.py gives a
    send and an all-to-all no fixed cost, which would be taken for hops here: of these the largest count, for bandwidth.
    """
    samples = measured.of("all_reduce", "all_gather", "reduce_scatter")
    several = len({each.sizes["size"] for each in samples}) > 1
    known = 0.0 if several else device.fast_link.latency_seconds
    for direct in (measured.of("all_to_all"), measured.of("send")):
        most = max((each.sizes["bytes"] for each in direct), default=0)
        samples += [each for each in direct if each.sizes["bytes"] >= most / 4]
    if len({each.sizes["bytes"] for each in samples}) < 2:
        return {}
    hop = Link(1.0 if several else 0.0, np.inf)
    units = ((1.0, Link(0.0, np.inf)), (0.0, hop), (0.0, Link(0.0, 1.0)), (0.0, Link(known, np.inf)))
    alone = [replace(device, collective_seconds=fixed, fast_link=link) for fixed, link in units]
    rows = np.array([[_collective_seconds(unit, each) for unit in alone] for each in samples])
    fixed, latency, per_byte = _relative_least_squares(rows[:, :-1], [each.seconds for each in samples], rows[:, -1])
    return {"collective_seconds": fixed, "fast_link": Link(known + latency, 1 / per_byte)}


def _host(measured: Measured, device: Hardware) -> Found:
    found: Found = {}
    copies = measured.of("to_device", "to_host")
    if len({each.sizes["bytes"] for each in copies}) > 1:
        rows = np.array([[1.0, float(each.sizes["bytes"])] for each in copies])
        latency, per_byte = _relative_least_squares(rows, [each.seconds for each in copies])
        found["host_link"] = Link(latency, 1 / per_byte)
    rates = [each.sizes["bytes"] / each.seconds for each in measured.of("host_adam")]
    return found | ({"host_adam_bytes_per_second": float(np.median(rates))} if rates else {})


def _rate(samples: Iterable[Sample], predicted: Callable[[Sample], float]) -> float:
    """Median of predicted over measured seconds."""
    return float(np.median([predicted(each) / each.seconds for each in samples]))


def _flops(sample: Sample) -> float:
    m, n, k = _shape(sample)
    return 2.0 * sample.sizes["groups"] * m * n * k


def _shape(sample: Sample) -> tuple[int, int, int]:
    return sample.sizes["m"], sample.sizes["n"], sample.sizes["k"]


def _product_seconds(device: Hardware, sample: Sample) -> float:
    return product.__wrapped__(device, sample.precision, *_shape(sample), sample.sizes["groups"])


def _attention_seconds(device: Hardware, sample: Sample) -> float:
    sizes = sample.sizes
    length = sizes["length"]
    shape = (sizes["sequences"], length, length, sizes["heads"], sizes["width"])
    both = attention(device, sample.precision, "flash", *shape)
    return both.forward if sample.what == "attention" else both.backward


def _collective_seconds(device: Hardware, sample: Sample) -> float:
    total, size = sample.sizes["bytes"], sample.sizes["size"]
    network = Network(replace(device, fast_domain=size), devices_per_node=size)
    if sample.what == "send":
        return network.send(total, 1)
    name = "all_gather" if sample.what == "reduce_scatter" else sample.what
    return float(getattr(network, name)(total, size, 1))


def _relative_least_squares(rows: Vector, seconds: Sequence[float], known: Vector | float = 0.0) -> list[float]:
    """Numbers of at least 0, the last above 0, that lessen the squares of relative errors of rows @ numbers + known."""
    scaled, wanted = rows / np.array(seconds)[:, None], 1 - known / np.array(seconds)
    width = scaled.shape[1]
    best, least = np.zeros(width), np.inf
    # So few numbers that every choice of those that are 0 can be tried.
    for kept in itertools.product((False, True), repeat=width - 1):
        columns = [*np.flatnonzero(kept), width - 1]
        found = np.linalg.lstsq(scaled[:, columns], wanted, rcond=None)[0]
        error = float(np.sum((scaled[:, columns] @ found - wanted) ** 2))
        if np.all(found >= 0) and found[-1] > 0 and error < least:
            best, least = np.zeros(width), error
            best[columns] = found
    return [float(each) for each in best]
