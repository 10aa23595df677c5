"""Seconds made up from a known profile give the profile back; what was not measured is another's, and says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.worker.profiling import kernels, links
from parallel.estimates.hardware import WANTED, Hardware, Link, hardware, read_profile
from parallel.estimates.network import Network
from parallel.estimates.operators import attention, product
from parallel.evidence.machine import COLLECTIVES, Measured, Sample, grouped_rate, measured_fields
from parallel.evidence.machine_profile import Machine, collected, document, shipped_for

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
    facts = {"memory_bytes": 10**11, "processors": 132, "reserved_bytes": 10**9, "host_memory_bytes": 10**12}
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


def test_groups_of_one_size_do_not_tell_a_hop_from_the_fixed_cost() -> None:
    pairs = [each for each in timings(TRUE) if each.sizes.get("size") == 2]
    found = measured_fields(Measured(pairs, {}, {}), nearest := hardware("h100", 8))
    assert found["fast_link"].latency_seconds == nearest.fast_link.latency_seconds
    assert found["fast_link"].bytes_per_second == pytest.approx(TRUE.fast_link.bytes_per_second, rel=0.02)
    device = replace(TRUE, **found)
    for total in links.TOTAL_BYTES["cuda"]:
        seconds = [Network(each, 2).all_reduce(total, 2, 1) for each in (device, TRUE)]
        assert seconds[0] == pytest.approx(seconds[1], rel=0.05)


def h200s(count: int) -> list[dict[str, Any]]:
    """What the measuring process tells of a machine of `count` H200s before it times anything."""
    facts = {"device": "NVIDIA H200", "kind": "cuda", "devices": count, "torch": "2.11.0", "driver": "580.1"}
    return [{"doing": "memory"}, {"machine": facts | {"memory_bytes": 150 * 10**9, "processors": 132}}]


def test_what_was_not_measured_is_the_shipped_profiles_and_says_why() -> None:
    left_out = [each for each in timings(TRUE) if each.what == "all_to_all" or each.precision == "fp8"]
    told = [{"sample": vars(each)} for each in timings(TRUE) if each not in left_out]
    failed = {"failed": "all_to_all", "why": "ranks [0, 1] did not finish in time"}
    fp8 = {"failed": "fp8", "why": "no such kernel"}
    found = document(*collected([*h200s(2), *told, failed, fp8]), "2026-11-23")
    here, shipped = read_profile(json.dumps(found), "here"), hardware("h200", 2)
    assert (here.name, here.memory_bytes, here.peak_bf16_flops) == ("h200", 150 * 10**9, shipped.peak_bf16_flops)
    by = "measured on NVIDIA H200, torch 2.11.0, driver 580.1, 2026-11-23: "
    assert found["bf16_flops"]["source"] == by + "products of several shapes"
    assert found["fast_link"]["source"] == by + "all_reduce, all_gather, reduce_scatter, send on up to 2 devices"
    assert here.fast_link.bytes_per_second == pytest.approx(TRUE.fast_link.bytes_per_second, rel=0.01)
    assert here.fp8_flops == shipped.fp8_flops
    assert found["fp8_flops"]["source"].startswith("not measured (fp8: no such kernel); as in the profile h200: ")
    assert found["network_link"]["source"].startswith("not measured; as in the profile h200: NDR")
    assert found["measured"]["failed"] == {"all_to_all": "ranks [0, 1] did not finish in time", "fp8": "no such kernel"}


def test_one_device_tells_nothing_of_links() -> None:
    found = document(*collected(h200s(1)), "2026-11-23")
    assert found["fast_link"]["source"].startswith("not measured (one device); as in the profile h200: ")
    assert found["fast_link"]["value"] == [4e-6, 3e11]


@pytest.mark.parametrize(
    ("name", "memory", "profile", "same"),
    [
        ("NVIDIA H200", 150e9, "h200", True),
        ("NVIDIA A100-SXM4-40GB", 42e9, "a100_40gb", True),
        ("NVIDIA H100 80GB HBM3", 85e9, "h100", True),
        ("Tesla V100-SXM2-32GB", 34e9, "v100", True),
        ("NVIDIA GB200", 198e9, "gb200_nvl72", True),
        ("NVIDIA GB300", 288e9, "gb300_nvl72", True),
        ("Ascend910B3", 65e9, "ascend_910b", True),
        ("NVIDIA H100 NVL", 100e9, "h100", False),
        ("NVIDIA L40S", 48e9, "a100_40gb", False),
        ("NVIDIA X1", 35e9, "v100", False),  # nothing is known of it but its memory
    ],
)
def test_a_device_by_its_drivers_name(name: str, memory: float, profile: str, same: bool) -> None:
    found, known = shipped_for(Machine(name, "cuda", 8, "2.11.0", "580.1", int(memory)))
    assert (found.name, known) == (profile, same)
    if same:
        assert hardware(name, 8) is hardware(profile, 8)


def test_a_device_that_no_profile_is_of_has_only_peaks_that_are_known() -> None:
    told = [{"machine": h200s(8)[1]["machine"] | {"device": "NVIDIA L40S"}}]
    found = document(*collected(told), "2026-11-23")
    assert found["name"] == "nvidia-l40s"
    assert (found["peak_bf16_flops"]["value"], found["peak_fp8_flops"]["value"]) == (362e12, None)
    assert found["fast_domain"] == {"value": 8, "source": "devices of this machine"}
