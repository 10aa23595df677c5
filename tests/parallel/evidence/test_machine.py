"""Seconds made up from a known profile give the profile back; what was not measured is another's, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.worker.profiling import kernels, links
from parallel.estimates.hardware import WANTED, Hardware, Link, hardware
from parallel.estimates.network import Network
from parallel.estimates.operators import attention, product
from parallel.evidence.machine import COLLECTIVES, Measured, Sample, grouped_rate, measured_fields

TRUE = replace(
    hardware("h200", 8),
    bf16_flops=7.0e14,
    fp32_flops=5.0e13,
    fp8_flops=1.1e15,
    half_depth=260.0,
    tile_128=0.9,
    tile_64=0.7,
    accumulate=0.85,
    attention_forward_flops=4.0e14,
    attention_backward_flops=3.1e14,
    memory_bytes_per_second=3.9e12,
    kernel_seconds=2e-6,
    launch_seconds=7e-6,
    collective_seconds=1.5e-5,
    fast_link=Link(3e-6, 3.5e11),
    host_link=Link(8e-6, 5.1e10),
    host_adam_bytes_per_second=3e10,
)


def timings(device: Hardware) -> Iterator[Sample]:
    """Of every kind that is measured on GPUs, at the shapes that are."""

    def of_product(what: str, precision: Any, groups: int, m: int, n: int, k: int, slower: float = 1.0) -> Sample:
        seconds = product(device, precision, m, n, k, groups) * slower
        return Sample(what, seconds, precision, {"m": m, "n": n, "k": k, "groups": groups})

    yield Sample("copy", 2e9 / device.memory_bytes_per_second, "bf16", {"bytes": 2 * 10**9})
    yield Sample("kernel", device.kernel_seconds, "bf16", {})
    yield Sample("launch", device.launch_seconds, "bf16", {})
    for shape in kernels.PRODUCTS_GPU:
        yield of_product("product", "bf16", 1, *shape)
    for shape in kernels.OTHER_PRODUCTS["cuda"]:
        yield of_product("product", "fp32", 1, *shape)
        yield of_product("product", "fp8", 1, *shape)
    for shape in kernels.ACCUMULATED:
        yield of_product("accumulated", "bf16", 1, *shape, slower=1 / device.accumulate)
    for grouped in kernels.GROUPED["cuda"]:
        yield of_product("product", "bf16", *grouped, slower=1.25)
    for sequences, length, heads, width in kernels.ATTENTION["cuda"]:
        both = attention(device, "bf16", "flash", sequences, length, length, heads, width)
        sizes = {"sequences": sequences, "length": length, "heads": heads, "width": width}
        yield Sample("attention", both.forward, "bf16", sizes)
        yield Sample("attention_backward", both.backward, "bf16", sizes)
    for name in COLLECTIVES:
        for size in (2, 4, 8):
            network = Network(device, size)
            for total in links.TOTAL_BYTES["cuda"]:
                made = {
                    "all_reduce": network.all_reduce(total, size, 1),
                    "all_to_all": network.all_to_all(total, size, 1),
                    "send": network.send(total, 1),
                }
                seconds = made.get(name, network.all_gather(total, size, 1))
                yield Sample(name, seconds, "fp32", {"bytes": total, "size": size})
    for total in links.COPIED_BYTES:
        link = device.host_link
        for name in ("to_device", "to_host"):
            yield Sample(name, link.latency_seconds + total / link.bytes_per_second, "fp32", {"bytes": total})
    yield Sample("host_adam", 1e9 / device.host_adam_bytes_per_second, "fp32", {"bytes": 10**9})


def test_a_profile_comes_back_from_the_seconds_it_predicts() -> None:
    facts = {"memory_bytes": 10**11, "processors": 132, "reserved_bytes": 10**9}
    # The nearest profile, which stands for what is not measured, must leave no trace in what is.
    measured = Measured(list(timings(TRUE)), {}, facts)
    found = measured_fields(measured, hardware("v100", 8))
    assert found.pop("half_depth") == pytest.approx(TRUE.half_depth, abs=15)
    for name in ("fast_link", "host_link"):
        link, true = found.pop(name), getattr(TRUE, name)
        assert link.latency_seconds == pytest.approx(true.latency_seconds, rel=0.01)
        assert link.bytes_per_second == pytest.approx(true.bytes_per_second, rel=0.01)
    for name, value in facts.items():
        assert found.pop(name) == value
    assert set(found) == set(WANTED) - {
        *("peak_bf16_flops", "peak_fp32_flops", "peak_fp8_flops", "fast_domain", "network_link"),
        *("half_depth", "fast_link", "host_link", *facts),
    }
    for name, value in found.items():
        assert value == pytest.approx(getattr(TRUE, name), rel=0.03), name
    assert grouped_rate(measured, TRUE) == pytest.approx(0.8)
