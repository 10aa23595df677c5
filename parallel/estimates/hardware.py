"""Profiles of devices: how fast they compute, how much they hold, how fast they talk.

A profile is a file of profiles/, one device a file, each number with its source. It describes one device, that is one
rank's share of a machine.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources import files
from math import isfinite, log2
from pathlib import Path
from typing import Any, Literal

from jobs.errors import InputError, closest
from parallel.estimates.devices import known

GIB = 2**30


@dataclass(frozen=True)
class Link:
    """A message of S bytes takes `latency_seconds + S / bytes_per_second` (one direction)."""

    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True, eq=False)
class Hardware:
    """One device, equal to itself alone, so that costs are quickly found by it again.

    FLOP/s are dense; a peak is None where none is published, and then no MFU is shown.
    """

    name: str
    memory_bytes: int
    """0 of a CPU, whose profile has the rates of one core: the machine's memory and cores, divided by its ranks."""
    reserved_bytes: int
    """What a rank holds before its first tensor: context, communicators, kernels."""
    memory_bytes_per_second: float
    """That a kernel which only moves data reaches."""
    peak_bf16_flops: float | None
    peak_fp32_flops: float | None
    peak_fp8_flops: float | None
    bf16_flops: float
    """What a large matrix product reaches, before its shape costs anything."""
    fp32_flops: float
    fp8_flops: float
    processors: int
    """Streaming multiprocessors, over which the tiles of a product are dealt; 1: tiles cost nothing."""
    half_depth: float
    """Inner dimension of a product at which it reaches half of its rate."""
    tile_128: float
    """Rate of a tile of 128 x 128 over that of one of 128 x 256."""
    tile_64: float
    """The same of 64 x 128."""
    accumulate: float
    """Rate of a product that adds to a fp32 sum (weight gradients) over one that writes 16 bits."""
    attention_forward_flops: float
    attention_backward_flops: float
    kernel_seconds: float
    """That a kernel takes at least, on the device."""
    launch_seconds: float
    """That the host takes to start a kernel."""
    fast_domain: int
    """Devices joined by fast links; a node's at least."""
    collective_seconds: float
    """Fixed cost of a collective within the fast domain."""
    fast_link: Link
    network_link: Link
    """One device's share of the node's ports."""
    host_link: Link
    host_adam_bytes_per_second: float
    """Memory traffic of Adam on the host, one device's share."""
    host_memory_bytes: int = 0
    """Of the machine's main memory, one device's share; 0: not known. A CPU's is its memory_bytes."""
    stands_for: str = ""
    """The device that was asked for, where it has no profile and this is the nearest one's."""

    @property
    def notice(self) -> str:
        """What whoever plans with it must know; empty where it is the profile that was asked for."""
        if not self.stands_for:
            return ""
        return (
            f"{self.stands_for} HAS NO PROFILE: planned as if it were {self.name}, the nearest that has one; "
            "`fivefold profile` on such a machine writes its own"
        )

    def told(self) -> dict[str, str]:
        """For documents: whose numbers a plan is made with."""
        return {"profile": self.name, "notice": self.notice}

    def peak_flops(self, precision: Literal["fp32", "fp16", "bf16", "fp8"]) -> float | None:
        """FLOP/s that MFU is measured against: of bf16 for fp8 too, as the tables have it."""
        return self.peak_fp32_flops if precision == "fp32" else self.peak_bf16_flops

    def product_flops(self, precision: Literal["fp32", "fp16", "bf16", "fp8"]) -> float:
        """FLOP/s of a large matrix product."""
        return {"fp32": self.fp32_flops, "fp8": self.fp8_flops}.get(precision, self.bf16_flops)


_LINKS = ("fast_link", "network_link", "host_link")
_MAY_BE_ZERO = (
    *("memory_bytes", "reserved_bytes", "half_depth", "kernel_seconds", "collective_seconds", "host_memory_bytes"),
)
_UNKNOWN = {"host_memory_bytes": {"value": 0, "source": "not told"}}
"""Of profiles that were measured before it was."""
_FOLDER = files("parallel.estimates") / "profiles"


WANTED = tuple(field.name for field in fields(Hardware) if field.name not in ("name", "stands_for"))
"""What a profile's file has beside its name, each with its value and source."""


@cache
def profile_names() -> tuple[str, ...]:
    """Those that are shipped."""
    return tuple(
        sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))
    )


def shipped_text(name: str) -> str:
    """The file of a shipped profile."""
    return (_FOLDER / f"{name}.json").read_text(encoding="utf-8")


def read_profile(text: str, where: str) -> Hardware:
    """The profile of a file's text. InputError that names all that is missing: numbers, and numbers' sources."""
    try:
        given: Any = json.loads(text)
    except ValueError as error:
        raise InputError(where, None, f"is no JSON: {error}") from None
    if not isinstance(given, dict) or not all(isinstance(given.get(name, {}), dict) for name in WANTED):
        raise InputError(
            where, None, 'is no profile: {"name": "...", "memory_bytes": {"value": 1, "source": "..."}, ...}'
        )
    given = _UNKNOWN | given
    missing = [name for name in WANTED if name not in given]
    missing += [f"{name}.source" for name in WANTED if name in given and not given[name].get("source")]
    missing += [f"{name}.value" for name in WANTED if name in given and "value" not in given[name]]
    if "name" not in given:
        missing.insert(0, "name")
    if missing:
        raise InputError(where, None, f"lacks {', '.join(missing)}")
    values = {name: given[name]["value"] for name in WANTED}
    wrong = [f"{name}.value={values[name]!r} {rule}" for name in WANTED if (rule := _broken(name, values[name]))]
    if wrong:
        raise InputError(where, None, "; ".join(wrong))
    values.update({name: Link(*values[name]) for name in _LINKS})
    return Hardware(name=given["name"], **values)


def _broken(name: str, value: Any) -> str | None:
    """The rule that a field's value breaks."""
    if name in _LINKS:
        pair = isinstance(value, list) and len(value) == 2 and _number(value[0]) and _number(value[1])
        return None if pair and value[0] >= 0 and value[1] > 0 else "is not [seconds, bytes a second]"
    if name.startswith("peak_") and value is None:
        return None
    if not _number(value):
        return "is not a number"
    return None if value > 0 or (value == 0 and name in _MAY_BE_ZERO) else "is not above 0"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


@cache
def hardware(name: str, devices_per_node: int) -> Hardware:
    """The profile of one of `devices_per_node` devices of a machine: a shipped one's name, or a .json file's path.

    Of a device that has none but of which something is known, the nearest one's, which says so in `stands_for`.
    InputError for a name of which nothing is known, and for a file that is no profile.
    """
    if name.endswith(".json"):
        found = read_profile(_text(Path(name).expanduser()), name)
    elif name in profile_names():
        found = read_profile(shipped_text(name), f"{name}.json")
    else:
        device = known(name)
        if device is None:
            rule = f"unknown hardware; known: {', '.join(profile_names())}, or the path of a .json file"
            raise InputError("cluster.hardware", name, rule, closest(name, profile_names()))
        if device.profile in profile_names():  # by its driver's name, say
            return hardware(device.profile, devices_per_node)
        found = replace(nearest(device.memory_bytes, device.bf16_flops), stands_for=name)
    return found if found.memory_bytes else _share_of_this_machine(found, devices_per_node)


def nearest(memory_bytes: float, bf16_flops: float | None) -> Hardware:
    """The shipped accelerator whose memory and peak, where it is known, are off by the smallest factors."""
    others = [read_profile(shipped_text(name), name) for name in profile_names()]

    def distance(other: Hardware) -> float:
        off = abs(log2(other.memory_bytes / memory_bytes))
        return off + (abs(log2(other.peak_bf16_flops / bf16_flops)) if bf16_flops and other.peak_bf16_flops else 0.0)

    return min((other for other in others if other.memory_bytes), key=distance)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("cluster.hardware", path, f"cannot be read: {error}") from None


def _share_of_this_machine(core: Hardware, ranks: int) -> Hardware:
    """The machine's memory and cores divided by its ranks; `core` has the rates of one core."""
    cores = min(1.0, (os.cpu_count() or 1) / ranks)
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    return replace(
        core,
        memory_bytes=share,
        host_memory_bytes=share,
        memory_bytes_per_second=core.memory_bytes_per_second * cores,
        bf16_flops=core.bf16_flops * cores,
        fp32_flops=core.fp32_flops * cores,
        attention_forward_flops=core.attention_forward_flops * cores,
        attention_backward_flops=core.attention_backward_flops * cores,
        launch_seconds=core.launch_seconds / cores,
    )
