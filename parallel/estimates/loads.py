"""How unevenly tokens are routed to experts: as is assumed, or as a run recorded it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from jobs.errors import InputError
from parallel.fssdp import WINDOW, Limits, LoadHistory, busiest, materialise
from parallel.fssdp_dispatch import peak
from parallel.placement import Placement

Load = Literal["balanced", "natural", "p99"]
"""How unevenly tokens are routed: forced even; as trained with a balancing loss; as in one step of a hundred."""

LOADS: dict[Load, float] = {"balanced": 1.0, "natural": 1.25, "p99": 1.6}
"""Tokens of the busiest expert-parallel rank over the mean: what a balancing loss leaves. Assumptions."""

SAMPLES = 20
"""Of a recording: the last are looked at."""


class Shared(NamedTuple):
    """A layer's experts, once the busiest ranks share theirs."""

    busiest: float
    """Tokens of the busiest rank over the mean."""
    copies: float
    moved: float
    """Experts that the rank moves which moves most."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """Loads of a run's experts; two are equal only if they are one, which makes them quick to look up."""

    samples: tuple[tuple[tuple[int, ...], ...], ...]
    """[steps][layers][experts]."""

    @cached_property
    def _busiest(self) -> dict[int, float]:
        return {}

    def busiest(self, ranks: int) -> float:
        """Mean over layers and steps, of experts dealt evenly."""
        if ranks not in self._busiest:
            even = Placement.even(len(self.samples[0][0]), ranks)
            found = [peak(even, loads) * ranks / max(1, sum(loads)) for layers in self.samples for loads in layers]
            self._busiest[ranks] = sum(found) / len(found)
        return self._busiest[ranks]

    @cached_property
    def _shared(self) -> dict[tuple[int, Limits], Shared]:
        return {}

    def shared(self, ranks: int, limits: Limits) -> Shared:
        """Mean over layers and steps, each with the copies that the steps before it led to."""
        key = ranks, limits
        if key not in self._shared:
            found = [each for layer in zip(*self.samples, strict=True) for each in _played(layer, ranks, limits)]
            self._shared[key] = Shared(*(sum(part) / len(found) for part in zip(*found, strict=True)))
        return self._shared[key]


def _played(steps: tuple[tuple[int, ...], ...], ranks: int, limits: Limits) -> list[Shared]:
    """One layer's; the first steps are remembered alone, where there are more."""
    even, history = Placement.even(len(steps[0]), ranks), LoadHistory(len(steps[0]))
    found = []
    for number, loads in enumerate(steps):
        if number >= WINDOW or number == len(steps) - 1:
            placed = materialise(even, history.forecasts(), limits)
            share = peak(placed, loads) * ranks / max(1, sum(loads))
            found.append(Shared(share, placed.copies, busiest(even, placed)))
        history.add(loads)
    return found


@cache
def recorded(path: str, experts: int) -> Recorded:
    """A run's `expert_loads.jsonl`. InputError where it is none, or of another number of experts."""

    def refused(rule: str, nearest: object = None) -> InputError:
        return InputError("layout.expert_loads", path, rule, nearest)

    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        samples = tuple(
            tuple(tuple(map(int, line["loads"][layer])) for layer in sorted(line["loads"], key=int))
            for line in lines[-SAMPLES:]
        )
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror}", "expert_loads.jsonl of a run folder") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise refused("has no loads of experts by layer in each line", "expert_loads.jsonl of a run folder") from None
    if not samples or not samples[0]:
        raise refused("is empty: a run records every tenth step")
    if len({len(layers) for layers in samples}) > 1 or any(len(each) != experts for each in samples[0]):
        raise refused(f"is of {len(samples[0][0])} experts, the model has {experts}")
    return Recorded(samples)
