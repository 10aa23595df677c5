"""What to do after a failed attempt. Pure functions: the controller acts on what they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jobs.spec import PolicySpec
from orchestrator.messages import Decision, Restart, Stop


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended before its last step."""

    kind: Literal["rank_died", "rank_failed", "node_lost", "input_error"]
    reason: str
    step: int
    """Last step that every rank had finished."""


def after_failure(failures: list[Failure], policy: PolicySpec) -> Decision:
    """Restart within the budget; stop at once on what no restart can mend. `failures` are this run's, newest last."""
    newest = failures[-1]
    if newest.kind == "input_error":
        return Stop(state="failed", reason=newest.reason)
    if len(failures) > policy.max_restarts:
        spent = f"{len(failures)} failed attempts, policy.max_restarts={policy.max_restarts}"
        return Stop(state="failed", reason=f"{newest.reason} ({spent})")
    return Restart(reason=newest.reason)
