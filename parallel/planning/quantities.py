"""Numbers as people write them: `141GB`, `400GB/s`, `5us`, `1T`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jobs.errors import InputError

_SCALES = {"": 1.0, "K": 1e3, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15}
_SCALES |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTP", 1)}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_UNITS = {"": "", "B": "bytes", "B/s": "bytes_per_second", "FLOP/s": "flops", "s": "seconds"}
_FORM = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*([A-Za-z]i?)??\s*(B/s|FLOP/s|B|s|)")


@dataclass(frozen=True)
class Quantity:
    """A value in base units; `unit` is one of bytes, bytes_per_second, flops (FLOP/s), seconds, or empty."""

    value: float
    unit: str


def quantity(path: str, text: str) -> Quantity:
    """Parse a number with an optional scale (K M G B T P, Ki Mi ..., m u n of seconds) and unit (B, B/s, FLOP/s, s)."""
    found = _FORM.fullmatch(text.strip())
    if found is not None:
        number, scale, unit = found[1], found[2] or "", found[3]
        scales = _SMALL if unit == "s" else _SCALES
        if scale in scales:
            return Quantity(float(number) * scales[scale], _UNITS[unit])
    raise InputError(path, text, "is a number with a unit of B, B/s, FLOP/s or s if it has one", "141GB")


def count(path: str, text: str) -> float:
    """A number of things, above 0, such as tokens: `300B`, `1.5T`, `2e12`."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)([KMGBT]?)", text.strip())
    value = float(match[1]) * _SCALES[match[2]] if match else 0.0
    if value <= 0:
        raise InputError(path, text, "is a number above 0, with K, M, B or T for thousands to trillions", "1T")
    return value
