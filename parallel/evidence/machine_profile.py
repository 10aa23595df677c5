"""The profile of a machine at hand, as a file: what was measured, and the other numbers of the nearest one shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from parallel.estimates.devices import known
from parallel.estimates.hardware import (
    WANTED,
    Hardware,
    Link,
    hardware,
    nearest,
    profile_names,
    read_profile,
    shipped_text,
)
from parallel.evidence.machine import COLLECTIVES, Measured, Sample, measured_fields

_HOW = {
    "memory_bytes": "what torch reports",
    "processors": "what torch reports",
    "reserved_bytes": "what tensors do not hold, with five communicators of {devices} devices",
    "memory_bytes_per_second": "a kernel that reads and writes",
    "bf16_flops": "products of several shapes",
    "fp32_flops": "products of several shapes",
    "fp8_flops": "products scaled by tensor",
    "half_depth": "products of several shapes",
    "tile_128": "products of several shapes",
    "tile_64": "products of several shapes",
    "accumulate": "products that add to a sum in fp32 against those that write bf16",
    "attention_forward_flops": "causal attention by torch's choice of kernel",
    "attention_backward_flops": "causal attention by torch's choice of kernel",
    "kernel_seconds": "the smallest kernels, one after another",
    "launch_seconds": "operations of a layer on the smallest tensors",
    "collective_seconds": "{collectives} on up to {devices} devices",
    "fast_link": "{collectives} on up to {devices} devices",
    "host_link": "copies from and to pinned memory, {devices} devices at once",
    "host_adam_bytes_per_second": "torch's fused Adam, {devices} devices at once",
    "host_memory_bytes": "free, for {devices} devices",
}
_ON_DEVICE = ("memory", "launches", "kernels", "products", "other precisions", "fp8", "sums", "attention")
_JOINT = ("collective_seconds", "fast_link")
_PARTS = {
    "memory": ("memory_bytes_per_second",),
    "launches": ("launch_seconds",),
    "kernels": ("kernel_seconds",),
    "products": ("bf16_flops", "fp32_flops", "half_depth", "tile_128", "tile_64"),
    "other precisions": ("bf16_flops", "fp32_flops"),
    "fp8": ("fp8_flops",),
    "sums": ("accumulate",),
    "attention": ("attention_forward_flops", "attention_backward_flops"),
    **dict.fromkeys(COLLECTIVES, _JOINT),
    "host": ("host_link", "host_adam_bytes_per_second", "reserved_bytes"),
}
_PARTS["device"] = tuple(name for part in _ON_DEVICE for name in _PARTS[part])
"""Fields that are for want of a part not measured."""
_FACTS = ("peak_bf16_flops", "peak_fp32_flops", "peak_fp8_flops", "fast_domain")


@dataclass(frozen=True)
class Machine:
    """What a machine says of itself: its `devices` are `count` of one name, each of the bytes that torch reports."""

    device: str
    kind: str
    count: int
    torch: str
    driver: str
    memory_bytes: int = 0
    """0 of a CPU."""

    @property
    def described(self) -> str:
        driver = f", driver {self.driver}" if self.driver else ""
        return f"{self.device}, torch {self.torch}{driver}"


def shipped_for(machine: Machine) -> tuple[Hardware, bool]:
    """The shipped profile that describes the machine's devices best, and whether it is of these very devices."""
    if machine.kind == "cpu":
        return read_profile(shipped_text("laptop_cpu"), "laptop_cpu"), True
    device = known(machine.device)
    if device is not None and device.profile in profile_names():
        return hardware(device.profile, machine.count), True
    return nearest(machine.memory_bytes, device.bf16_flops if device else None), False


def document(machine: Machine, measured: Measured, date: str) -> dict[str, Any]:
    """A profile's file; beside its fields `measured` has every sample, from which they can be had again."""
    shipped, same = shipped_for(machine)
    given = json.loads(shipped_text(shipped.name))
    found = measured_fields(measured, shipped)
    facts = {} if same else _facts(machine)
    by = f"measured on {machine.described}, {date}"
    timed = ", ".join(what for what in COLLECTIVES if measured.of(what))
    fields: dict[str, Any] = {"name": shipped.name if same else "-".join(machine.device.lower().split())}
    for name in WANTED:
        if name in found:
            how = _HOW[name].format(devices=machine.count, collectives=timed)
            fields[name] = {"value": _plain(found[name]), "source": f"{by}: {how}"}
        elif name in facts:
            fields[name] = {"value": facts[name][0], "source": facts[name][1]}
        else:
            source = f"as in the profile {shipped.name}: {given[name]['source']}"
            if not (same and name in _FACTS):
                source = f"not measured{_why(name, machine, measured)}; {source}"
            fields[name] = {"value": given[name]["value"], "source": source}
    samples = [asdict(each) for each in measured.samples]
    return fields | {"measured": {"samples": samples, "failed": dict(measured.failed)}}


def _facts(machine: Machine) -> dict[str, tuple[Any, str]]:
    """Of devices that no shipped profile is of."""
    device = known(machine.device)
    unknown = (None, f"not known of {machine.device}")
    return {
        "peak_bf16_flops": (device.bf16_flops, "its maker's datasheet") if device else unknown,
        "peak_fp32_flops": unknown,
        "peak_fp8_flops": unknown,
        "fast_domain": (machine.count, "devices of this machine"),
    }


def _why(name: str, machine: Machine, measured: Measured) -> str:
    reasons = [f"{part}: {why}" for part, why in measured.failed.items() if name in _PARTS.get(part, ())]
    if name in (*_JOINT, "reserved_bytes") and machine.count == 1:
        reasons.append("one device")
    return f" ({'; '.join(reasons)})" if reasons else ""


def _plain(value: Any) -> Any:
    """To as many digits as a clock is good for."""
    if isinstance(value, Link):
        return [_plain(value.latency_seconds), _plain(value.bytes_per_second)]
    return float(f"{value:.4g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Difference:
    """A number of a profile beside the shipped one's."""

    name: str
    shipped: float
    here: float


def differences(here: Hardware, shipped: Hardware) -> Iterator[Difference]:
    """Of all numbers that were found to be others; a link's are dotted."""
    for name in WANTED:
        was, now = getattr(shipped, name), getattr(here, name)
        if isinstance(now, Link):
            for part, value in asdict(now).items():
                if value != getattr(was, part):
                    yield Difference(f"{name}.{part}", getattr(was, part), value)
        elif now != was and now is not None and was is not None:
            yield Difference(name, was, now)


def collected(lines: list[Mapping[str, Any]]) -> tuple[Machine, Measured]:
    """Of the JSON lines that the measuring process tells: `machine`, `sample`, `failed` with `why`."""
    told: dict[str, Any] = {}
    samples, failed = [], {}
    for line in lines:
        told |= line.get("machine", {})
        if "sample" in line:
            samples.append(Sample(**line["sample"]))
        elif "failed" in line:
            failed[line["failed"]] = line["why"]
    counted = ("memory_bytes", "processors", "reserved_bytes", "host_memory_bytes")
    facts = {name: told[name] for name in counted if name in told}
    machine = Machine(
        told["device"], told["kind"], told["devices"], told["torch"], told["driver"], told.get("memory_bytes", 0)
    )
    return machine, Measured(samples, failed, facts)
