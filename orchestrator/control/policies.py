"""What to do after a failed attempt. Pure functions: the controller acts on what they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jobs.spec import PolicySpec
from orchestrator.messages import Decision, Restart, Stop

Kind = Literal["input_error", "node_lost", "rank_hung", "rank_died", "rank_failed", "rank_exited"]
"""What is to blame comes before what it leads to: when a rank dies its peers fail too, and who fails then exits."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended before its last step."""

    kind: Kind
    reason: str
    step: int
    """Last step that every rank had finished."""


def blamed(one: Failure | None, other: Failure | None) -> Failure | None:
    """Which of two failures of an attempt led to the other; of equals the first."""
    found = [failure for failure in (one, other) if failure is not None]
    return min(found, key=lambda failure: get_args(Kind).index(failure.kind), default=None)


def after_failure(failures: list[Failure], policy: PolicySpec) -> Decision:
    """Restart within the budget; stop at once on what no restart can mend. `failures` are this run's, newest last."""
    newest = failures[-1]
    if newest.kind == "input_error":
        return Stop(state="failed", reason=newest.reason)
    if len(failures) > policy.max_restarts:
        spent = f"{len(failures)} failed attempts, policy.max_restarts={policy.max_restarts}"
        return Stop(state="failed", reason=f"{newest.reason} ({spent})")
    return Restart(reason=newest.reason)
