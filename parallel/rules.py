"""What the rows of parallel/capabilities.py are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jobs.spec import JobSpec
from parallel.layout import Layout

Reason = Callable[[Layout, JobSpec], str | None]
Engines = tuple[Literal["megatron", "deepspeed"], ...]

BOTH: Engines = ("megatron", "deepspeed")
MEGATRON: Engines = ("megatron",)
DEEPSPEED: Engines = ("deepspeed",)


@dataclass(frozen=True)
class JobRule:
    """Refuses a job whatever its layout. `path` is the value to blame, `nearest` one that would do."""

    path: str
    engines: Engines
    reason: Callable[[JobSpec], str | None]
    nearest: object = None


@dataclass(frozen=True)
class Rule:
    """Refuses a layout. `key` names the class of refusals in a plan's account; `axis` is the degree that it blames."""

    key: str
    axis: str
    engines: Engines
    reason: Reason


@dataclass(frozen=True)
class BatchRule:
    """Refuses a micro-batch at a layout, given how many of them a rank computes in a step."""

    key: str
    axis: str
    engines: Engines
    reason: Callable[[Layout, JobSpec, int], str | None]


def when(refused: Callable[[JobSpec], object], reason: str) -> Callable[[JobSpec], str | None]:
    return lambda job: reason if refused(job) else None
