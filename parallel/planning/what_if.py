"""A hardware profile with some of its numbers changed: `hardware.memory=141GB`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from jobs.errors import InputError, closest
from parallel.estimates.hardware import Hardware
from parallel.planning.quantities import quantity

_PREFIX = "hardware."


def changed(device: Hardware, assumptions: Sequence[str]) -> Hardware:
    """The profile under `hardware.FIELD=VALUE` assumptions.

    A field's name may leave out what its value's unit says: `hardware.memory=141GB` is `memory_bytes`,
    `hardware.memory=4TB/s` is `memory_bytes_per_second`. InputError for a field or a value that is none.
    """
    for assumption in assumptions:
        key, given, text = assumption.partition("=")
        if not given or not key.startswith(_PREFIX):
            rule = "has the form hardware.FIELD=VALUE; other keys are changed by overrides, such as cluster.nodes=2"
            raise InputError("--what-if", assumption, rule, f"{_PREFIX}memory=141GB")
        device = _with(device, key, text)
    return device


def numbers(profile: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of a profile's numbers; those of links are dotted."""
    for field in fields(profile):
        value = getattr(profile, field.name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif not isinstance(value, str):
            yield f"{prefix}{field.name}", value


def _with(device: Hardware, key: str, text: str) -> Hardware:
    short = key.removeprefix(_PREFIX)
    known = dict(numbers(device))
    wanted = quantity(key, text)
    # What a unit may stand for; a link's seconds are its latency.
    endings = [f"{joint}{wanted.unit}" for joint in ("_", ".", ".latency_")] if wanted.unit else []
    name = next((each for each in (short, *(short + ending for ending in endings)) if each in known), None)
    if name is None:
        nearest = closest(short, known)
        raise InputError(
            key, text, f"is no number of a profile, which has {', '.join(known)}", nearest and _PREFIX + nearest
        )
    unit = next((unit for unit in ("bytes_per_second", "bytes", "flops", "seconds") if name.endswith(unit)), "")
    if wanted.unit not in ("", unit):
        raise InputError(key, text, f"{name} is a number of {unit or 'no unit'}, not of {wanted.unit}")
    if wanted.value <= 0:
        raise InputError(key, text, "is above 0")
    value: Any = round(wanted.value) if isinstance(known[name], int) else wanted.value
    parent, _, leaf = name.rpartition(".")
    if parent:
        leaf, value = parent, replace(getattr(device, parent), **{leaf: value})
    return replace(device, **{leaf: value})
