"""Profiles of devices: how fast they compute, how much they hold, how fast they talk; each with its source.

A profile describes one device, that is one rank's share of a machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from jobs.errors import InputError, closest

GIB = 2**30


@dataclass(frozen=True)
class Link:
    """A message of S bytes takes `latency_seconds + S / bytes_per_second` (one direction)."""

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Hardware:
    """One device. FLOP/s are dense; `peak` is None where none is published, and then no MFU is shown."""

    name: str
    source: str
    memory_bytes: int
    reserved_bytes: int
    """What a rank holds before its first tensor: context, communicators, kernels."""
    memory_bytes_per_second: float
    peak_bf16_flops: float | None
    peak_fp32_flops: float | None
    achieved_bf16_flops: float
    """What matrix products of a layer's size reach, alone."""
    achieved_fp32_flops: float
    layer_launch_seconds: float
    """Fixed cost of one layer's forward and backward, whatever its size: starting its operations."""
    intra_node: Link
    inter_node: Link
    host_link: Link

    def peak_flops(self, precision: Literal["fp32", "bf16"]) -> float | None:
        """FLOP/s that MFU is measured against."""
        return self.peak_bf16_flops if precision == "bf16" else self.peak_fp32_flops

    def achieved_flops(self, precision: Literal["fp32", "bf16"]) -> float:
        return self.achieved_bf16_flops if precision == "bf16" else self.achieved_fp32_flops


def _gpu(
    name: str,
    source: str,
    *,
    memory_gib: int,
    memory_bandwidth: float,
    peak_bf16: float,
    peak_fp32: float,
    nvlink: float,
    network: float,
) -> Hardware:
    """A GPU of an SXM board with a network port of its own.

    memory_gib: what torch reports as total. Efficiencies that all of them share: matrix products of a layer's size
    reach 60% of the bf16 peak (an 8192-cubed one 79% on an H200, Mixtral's two-layer step 50% in all) and 85% of the
    fp32 one; eager kernels of one layer take about a millisecond to launch.
    """
    return Hardware(
        name=name,
        source=source,
        memory_bytes=memory_gib * GIB,
        reserved_bytes=2 * GIB,
        memory_bytes_per_second=memory_bandwidth,
        peak_bf16_flops=peak_bf16,
        peak_fp32_flops=peak_fp32,
        achieved_bf16_flops=0.6 * peak_bf16,
        achieved_fp32_flops=0.85 * peak_fp32,
        layer_launch_seconds=1e-3,
        intra_node=Link(4e-6, nvlink),
        inter_node=Link(12e-6, network),
        host_link=Link(10e-6, 55e9),
    )


def _a100_80gb(devices_per_node: int) -> Hardware:
    return _gpu(
        "a100_80gb",
        "NVIDIA A100 datasheet; all-reduce bus bandwidth 220 GB/s at 1 GB over 4 GPUs (vTrain traces); HDR 200 Gb/s",
        memory_gib=79,
        memory_bandwidth=2.039e12,
        peak_bf16=312e12,
        peak_fp32=19.5e12,
        nvlink=220e9,
        network=21e9,
    )


def _h100(devices_per_node: int) -> Hardware:
    return _gpu(
        "h100",
        "NVIDIA H100 SXM datasheet; all-to-all of 470 MB on 8, 16, 32, 64: 1.3, 5.8, 8.1, 9.2 ms (arXiv 2603.07685)",
        memory_gib=79,
        memory_bandwidth=3.35e12,
        peak_bf16=989.5e12,
        peak_fp32=67e12,
        nvlink=330e9,
        network=46e9,
    )


def _h200(devices_per_node: int) -> Hardware:
    return _gpu(
        "h200",
        "NVIDIA H200 SXM datasheet; two GPUs measured: all-reduce 311, all-to-all 298, all-gather 254 GB/s",
        memory_gib=139,
        memory_bandwidth=4.8e12,
        peak_bf16=989.5e12,
        peak_fp32=67e12,
        nvlink=300e9,
        network=46e9,
    )


def _laptop_cpu(devices_per_node: int) -> Hardware:
    """This machine, its memory and cores divided by its ranks. Rates of one core measured with torch 2.13."""
    cores_per_rank = min(1.0, (os.cpu_count() or 1) / devices_per_node)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices_per_node
    loopback = Link(0.5e-3, 1e9)
    return Hardware(
        name="laptop_cpu",
        source="one server core, torch 2.13: 512 x 128 x 512 products at 75 (fp32) and 1.3 (bf16) GFLOP/s; "
        "gloo on loopback, 4 ranks on 2 cores: all-reduce 4.8 ms at 1 KB, 17 ms at 8 MB",
        memory_bytes=memory,
        reserved_bytes=GIB // 2,
        memory_bytes_per_second=5e9 * cores_per_rank,
        peak_bf16_flops=None,
        peak_fp32_flops=None,
        achieved_bf16_flops=1.3e9 * cores_per_rank,
        achieved_fp32_flops=75e9 * cores_per_rank,
        layer_launch_seconds=3e-3 / cores_per_rank,
        intra_node=loopback,
        inter_node=Link(0.5e-3, 0.11e9),
        host_link=Link(0.0, 5e9),
    )


_PROFILES: dict[str, Callable[[int], Hardware]] = {
    "laptop_cpu": _laptop_cpu,
    "a100_80gb": _a100_80gb,
    "h100": _h100,
    "h200": _h200,
}


@cache
def hardware(name: str, devices_per_node: int) -> Hardware:
    """The profile of one of `devices_per_node` devices of a machine. InputError for a name that is not known."""
    if name not in _PROFILES:
        rule = f"unknown hardware; known: {', '.join(_PROFILES)}"
        raise InputError("cluster.hardware", name, rule, closest(name, _PROFILES))
    return _PROFILES[name](devices_per_node)
