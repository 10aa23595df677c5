"""Which faults a run of chaos gets, and where: drawn from a seed, so that it can be had again. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.errors import InputError, closest
from jobs.injections import CONTROL_FAULTS, KINDS, SAVE_FAULTS, FaultKind, Injection
from jobs.spec import JobSpec
from orchestrator.control.stragglers import WINDOW
from parallel.layout import Layout

_GAP = 2
"""Steps from one fault to the next, at least, so that each is told apart."""
_SLOW_STEPS = WINDOW + 10
"""Of a slow rank: it has to be told of a rank that was slow for a while, and no other fault may begin an attempt."""
_UNHEARD = 30
"""Steps that ranks may train after their controller was killed: who is stopped then is nobody's to find."""
_DIVERGES_IN: dict[FaultKind, int] = {"nan": 5, "exploding_loss": 10}
"""Steps after which it is known that a loss has."""


@dataclass(frozen=True)
class Entry:
    """A fault that may be drawn."""

    name: str
    kind: FaultKind
    changes: dict[str, Any]


_IN_OTHER_WORDS = (
    *("slow_compute", "slow_data", "slow_network", "exploding_loss", "storage_stall"),
    "controller_killed",
)
CATALOGUE = (
    *(Entry(kind, kind, {}) for kind in KINDS if kind not in _IN_OTHER_WORDS),
    Entry("slow_compute_1.2", "slow_compute", {"factor": 1.2, "steps": _SLOW_STEPS}),
    Entry("slow_compute_2", "slow_compute", {"factor": 2.0, "steps": _SLOW_STEPS}),
    Entry("slow_data", "slow_data", {"steps": _SLOW_STEPS}),
    Entry("slow_network", "slow_network", {"seconds": 0.02, "steps": _SLOW_STEPS}),
    Entry("exploding_loss", "exploding_loss", {"factor": 1e4}),
    Entry("storage_stall", "storage_stall", {"seconds": 3.0}),
    Entry("controller_killed_in_training", "controller_killed", {"moment": "checkpoint_written"}),
    Entry("controller_killed_at_start", "controller_killed", {"moment": "training_started"}),
    Entry("controller_killed_in_recovery", "controller_killed", {"moment": "restarting"}),
)
NAMES = tuple(entry.name for entry in CATALOGUE)


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
    steps, needed = _steps(wanted, every, [0] * count)
    if needed > last:
        rule = f"has no room for {count} faults with checkpoints every {every} steps"
        raise InputError("train.steps", last, rule, needed)
    spare = (last - needed) // (2 * count)  # half, for the steps that are moved off checkpoints
    steps, _ = _steps(wanted, every, [dice.randint(0, spare) for _ in wanted])
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
        for entry, step in zip(wanted, steps, strict=True)
    )


def _steps(wanted: Sequence[Entry], every: int, later: Sequence[int]) -> tuple[list[int], int]:
    """Where faults happen, each so much later than it could, and the steps that a job must have for them."""
    found, free = [], 2
    for entry, wait in zip(wanted, later, strict=True):
        step = free + wait
        # Not at a checkpoint's step: weights that it ruins would be saved, and no rank can be blamed for them.
        step += step % every == 0
        found.append(step)
        free = step + _room(entry.kind, every)
    return found, free + every


def _room(kind: FaultKind, every: int) -> int:
    """Steps until the next fault."""
    if kind in ("slow_compute", "slow_data", "slow_network"):
        return _SLOW_STEPS + 1
    if kind in _DIVERGES_IN:
        return _DIVERGES_IN[kind]
    if kind == "controller_killed":
        return _UNHEARD
    # What a checkpoint lacks is made good by the one after it.
    return 2 * every + _GAP if kind in (*SAVE_FAULTS, *CONTROL_FAULTS) else _GAP


def _phase(kind: FaultKind, dice: random.Random) -> Any:
    """Where in its step; what a rank's part in the agreement can be is left out of only there."""
    drawn = dice.choice(("data", "compute", "agree"))
    return "agree" if kind == "skipped_collective" else drawn
