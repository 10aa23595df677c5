"""What to do after a failed attempt. Pure functions of the run's history: the controller acts on what they return."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jobs.spec import PolicySpec
from orchestrator.messages import Decision, Replan, Restart, Stop

Kind = Literal[
    "input_error",
    "node_lost",
    "diverged",
    "out_of_memory",
    "rank_hung",
    "rank_waits",
    "rank_died",
    "rank_failed",
    "rank_exited",
    "preempted",
]
"""What is to blame comes before what it leads to: when a rank dies its peers fail too, and who fails then exits."""

_FREE: tuple[Kind, ...] = ("preempted",)
"""Nothing was wrong: it costs no restart of the budget."""
_OF_MACHINES: tuple[Kind, ...] = ("node_lost", "rank_hung", "rank_died")
"""What a machine that is not sound does. Twice on one node, and it is suspect."""
_BY_CHANCE: tuple[Kind, ...] = ("node_lost", "rank_died", "preempted")
"""What may well strike twice at one step, and is to be tried again."""
_DETERMINED = re.compile(r"SIG(SEGV|ABRT|BUS|FPE|ILL)")
"""Deaths of a rank's own doing."""
_FUTILE = 3
"""Failures in a row without a step that is new, after which a run is given up."""
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 1.0, 60.0
_OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|MemoryError|out of memory|can't allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended before its last step."""

    kind: Kind
    reason: str
    step: int
    """Last step that every rank had finished; of a diverged run, the first that shows it."""
    at: float = 0.0
    """Unix seconds."""
    node: str | None = None
    """Whose fault it may be."""

    @property
    def error(self) -> str:
        """The same for two failures that differ in numbers alone."""
        return f"{self.kind}: " + re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "#", self.reason)


def blamed(one: Failure | None, other: Failure | None) -> Failure | None:
    """Which of two failures of an attempt led to the other; of equals the first."""
    found = [failure for failure in (one, other) if failure is not None]
    return min(found, key=lambda failure: get_args(Kind).index(failure.kind), default=None)


def failed_how(message: str) -> Kind:
    """Of a rank that raised, by the error's name and first line."""
    return "out_of_memory" if _OUT_OF_MEMORY.search(message) else "rank_failed"


def history(events: Iterable[Mapping[str, Any]]) -> list[Failure]:
    """The failures that a run's events tell of, oldest first, since a person last said that it is to go on."""
    found: list[Failure] = []
    for event in events:
        if event["kind"] == "resumed":
            found.clear()
        elif event["kind"] == "attempt_failed":
            data = event["data"]
            found.append(Failure(data["failure"], data["reason"], data["step"], event["at"], data["node"]))
    return found


def after_failure(failures: Sequence[Failure], policy: PolicySpec) -> Decision:
    """What follows the newest of `failures`, those of a run so far.

    No restart mends the user's input, or what came twice at one step. Memory that ran out is for a layout that needs
    less. Else the run restarts: at once where it had come further than ever before, and else after a while that
    doubles. It ends where the budget of a rolling window is spent, or where it comes no further.
    """
    newest = failures[-1]
    if newest.kind == "input_error":
        return Stop(state="failed", reason=newest.reason)
    if newest.kind in _FREE:
        return Restart(reason=newest.reason)
    counted = [failure for failure in failures if failure.kind not in _FREE]
    recent = [failure for failure in counted if newest.at - failure.at <= 3600 * policy.window_hours]
    if _came_before(counted):
        reason = f"{newest.reason} (the same at step {newest.step} twice: another restart would not mend it)"
        return Stop(state="failed", reason=reason)
    if len(recent) > policy.max_restarts:
        spent = f"{len(recent)} failed attempts in {policy.window_hours:g} h, policy.max_restarts={policy.max_restarts}"
        return Stop(state="failed", reason=f"{newest.reason} ({spent})")
    futile = _without_progress(counted)
    if futile > _FUTILE:
        return Stop(state="failed", reason=f"{newest.reason} (no new step was reached in {futile} attempts)")
    if newest.kind == "out_of_memory":
        return Replan(reason=newest.reason)
    return Restart(reason=newest.reason, delay_seconds=_delay(futile, newest.at))


def suspects(failures: Sequence[Failure], policy: PolicySpec) -> set[str]:
    """Nodes that were to blame twice within the window, for what a sound machine does not do."""
    newest = max((failure.at for failure in failures), default=0.0)
    blame = [
        failure.node
        for failure in failures
        if failure.node and failure.kind in _OF_MACHINES and newest - failure.at <= 3600 * policy.window_hours
    ]
    return {node for node in blame if blame.count(node) > 1}


def _came_before(failures: Sequence[Failure]) -> bool:
    newest = failures[-1]
    by_chance = newest.kind in _BY_CHANCE and not _DETERMINED.search(newest.reason)
    return not by_chance and any(
        (earlier.step, earlier.error) == (newest.step, newest.error) for earlier in failures[:-1]
    )


def _without_progress(failures: Sequence[Failure]) -> int:
    """How many of the newest failures came no further than those before them had."""
    futile, best = 0, -1
    for failure in failures:
        futile = 0 if failure.step > best else futile + 1
        best = max(best, failure.step)
    return futile


def _delay(futile: int, seed: float) -> float:
    """Seconds; jittered, so that a thousand jobs of a cluster that failed at once do not come back at once."""
    if futile == 0:
        return 0.0
    longest = min(_FIRST_DELAY_SECONDS * float(2 ** (futile - 1)), _LONGEST_DELAY_SECONDS)
    return longest * random.Random(seed).uniform(0.5, 1.0)
