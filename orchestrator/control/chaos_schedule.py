"""Which faults a run of chaos gets, and where: drawn from a seed, so that it can be had again. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.errors import InputError, closest
from jobs.injections import KINDS, FaultKind, Injection
from jobs.spec import JobSpec
from parallel.layout import Layout

_GAP = 2
"""Steps between two faults, so that each is told apart."""


@dataclass(frozen=True)
class Entry:
    """A fault that may be drawn."""

    name: str
    kind: FaultKind
    changes: dict[str, Any]


_IN_OTHER_WORDS = ("slow_compute", "exploding_loss", "storage_stall", "controller_killed")
CATALOGUE = (
    *(Entry(kind, kind, {}) for kind in KINDS if kind not in _IN_OTHER_WORDS),
    Entry("slow_compute_1.2", "slow_compute", {"factor": 1.2}),
    Entry("slow_compute_2", "slow_compute", {"factor": 2.0}),
    Entry("exploding_loss", "exploding_loss", {"factor": 1e4}),
    Entry("storage_stall", "storage_stall", {"seconds": 3.0}),
    Entry("controller_killed_in_training", "controller_killed", {"moment": "checkpoint_written"}),
    Entry("controller_killed_at_start", "controller_killed", {"moment": "training_started"}),
    Entry("controller_killed_in_recovery", "controller_killed", {"moment": "restarting"}),
)
NAMES = tuple(entry.name for entry in CATALOGUE)
UNDETECTED = (
    "stop",
    "held_lock",
    "skipped_collective",
    "livelock",
    "nan",
    "exploding_loss",
    "slow_compute_1.2",
    "slow_compute_2",
    "slow_data",
    "slow_network",
)
"""Nobody looks for these yet: they are injected where they are named, and left out otherwise."""


def chosen(names: Sequence[str]) -> list[Entry]:
    """The entries of these names. InputError where there is no such one."""
    for name in names:
        if name not in NAMES:
            raise InputError("--kinds", name, f"is not one of {', '.join(NAMES)}", closest(name, NAMES))
    return [entry for entry in CATALOGUE if entry.name in names]


def draw(job: JobSpec, entries: Sequence[Entry], count: int, seed: int) -> tuple[Injection, ...]:
    """`count` faults, each of `entries` as often as another, at steps in the order they happen.

    InputError where the job is too short for them, or writes no checkpoints.
    """
    every, last = job.checkpoint.interval, job.train.steps
    if not every:
        raise InputError("checkpoint.interval", 0, "with no checkpoint every fault would lose all that is trained", 10)
    dice = random.Random(seed)
    wanted = [entry for _ in range(-(-count // len(entries))) for entry in dice.sample(entries, len(entries))][:count]
    # Not at a checkpoint's step: weights that this step ruins would be saved, and no rank can be blamed for them.
    free = [step for step in range(2, last - every) if step % every and step % _GAP]
    if len(free) < count:
        rule = f"has room for {len(free)} faults between checkpoints every {every} steps, and {count} are asked for"
        raise InputError("train.steps", last, rule, _steps_for(count, every))
    world = Layout.of(job.layout).world
    return tuple(
        Injection(
            kind=entry.kind,
            rank=dice.randrange(world),
            step=step,
            phase=_phase(entry.kind, dice),
            point=dice.randint(1, 3),
            **entry.changes,
        )
        for entry, step in zip(wanted, sorted(dice.sample(free, count)), strict=True)
    )


def _phase(kind: FaultKind, dice: random.Random) -> Any:
    """Where in its step; what a rank's part in the agreement can be is left out of only there."""
    drawn = dice.choice(("data", "compute", "agree"))
    return "agree" if kind == "skipped_collective" else drawn


def _steps_for(count: int, every: int) -> int:
    """Steps that have room for so many faults."""
    last = every + 3
    while sum(1 for step in range(2, last - every) if step % every and step % _GAP) < count:
        last += 1
    return last
