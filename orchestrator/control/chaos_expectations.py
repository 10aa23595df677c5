"""What is right after each injected fault: a table, and what a run's own files say of it. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from jobs.injections import FaultKind, Injection

Decision = Literal["restart", "replan", "stop", "resume", "goes on"]
Record = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """How a fault of one kind is found, named and answered."""

    event: str
    """Kind of the event that tells of it."""
    text: str = ""
    """Regular expression that its message, or the traceback with it, has to match."""
    by_rank: bool = True
    """Whether a rank is to blame, which both the event and the verdict on the attempt have to name."""
    failures: tuple[str, ...] = ()
    """What the attempt may be said to have failed of; empty: it must not be said to have failed."""
    decisions: tuple[Decision, ...] = ("restart",)
    intervals: int = 1
    """Checkpoint intervals that may be lost at most."""


_HUNG = Rule("rank_hung", failures=("rank_hung",))
_DIVERGED = Rule("diverged", by_rank=False, failures=("diverged",), intervals=3)
_SLOW = Rule("rank_slow", decisions=("goes on",))
_DAMAGED = Rule("checkpoint_damaged", by_rank=False, failures=("rank_died",), intervals=2)
_REFUSED = r"File too large|No space left|[Ii]nput/output error|inline_container"
"""The last is torch's writer, which hides why a file came out short."""
_UNWRITTEN = Rule("rank_failed|checkpoint_failed", _REFUSED, False, ("rank_failed",), ("restart", "goes on"), 2)

RULES: dict[FaultKind, Rule] = {
    "exception": Rule("rank_failed", "injected at step", failures=("rank_failed",)),
    "kill": Rule("rank_exited", "SIGKILL", failures=("rank_died",)),
    "stop": _HUNG,
    "terminate": Rule("attempt_failed", by_rank=False, failures=("preempted",), intervals=0),
    "segfault": Rule("rank_exited", "SIGSEGV", failures=("rank_died",)),
    "held_lock": _HUNG,
    "skipped_collective": _HUNG,
    "livelock": _HUNG,
    "nan": _DIVERGED,
    "exploding_loss": _DIVERGED,
    "out_of_memory": Rule("rank_failed", "MemoryError|OutOfMemory", True, ("out_of_memory",), ("restart", "replan")),
    "slow_compute": _SLOW,
    "slow_data": _SLOW,
    "slow_network": _SLOW,
    "zygote_killed": Rule("zygote_lost", by_rank=False, failures=("node_lost",)),
    "save_killed": Rule("rank_exited", "SIGKILL", failures=("rank_died",), intervals=2),
    "disk_full": _UNWRITTEN,
    "storage_error": _UNWRITTEN,
    "storage_stall": Rule("checkpoint_written", by_rank=False, decisions=("goes on",)),
    "agent_killed": Rule("node_lost", by_rank=False, failures=("node_lost",)),
    "controller_killed": Rule("resumed", by_rank=False, decisions=("resume",), intervals=0),
    "byte_flipped": _DAMAGED,
    "truncated": _DAMAGED,
    "deleted": _DAMAGED,
}


_DECISIONS: dict[str, Decision] = {
    "restarting": "restart",
    "replanned": "replan",
    "run_failed": "stop",
    "run_interrupted": "stop",
    "resumed": "resume",
}


@dataclass(frozen=True)
class Verdict:
    """One line of the scorecard."""

    fault: str
    injected: bool
    found: str | None
    """Kind of the event that told of it."""
    seconds: float | None
    """From the fault to that event."""
    named: bool
    """Whether the right rank and kind of failure were said."""
    decision: Decision | None
    steps_lost: int
    right: bool

    def as_dict(self) -> Record:
        return asdict(self)


def judge(place: int, fault: Injection, events: Sequence[Record], lines: Sequence[Record], interval: int) -> Verdict:
    """What became of the fault at `place` of the schedule, by a run's events and metrics; `interval`: checkpoints'."""
    rule = RULES[fault.kind]
    after = _since(place, events)
    if not after:
        return Verdict(fault.text, False, None, None, False, None, 0, False)
    injected, *after = after
    found = next((event for event in after if _tells(event, rule, fault)), None)
    decision, decided_at = _decision(after)
    failed = next((event for event in after[:decided_at] if event["kind"] == "attempt_failed"), None)
    named = found is not None and _named(failed, rule, fault)
    lost = 0 if decision == "goes on" else _steps_lost(after, lines)
    # Of a controller that is killed in a recovery, the fault that it recovers from costs what it does.
    intervals = rule.intervals + (fault.kind == "controller_killed" and fault.moment != "checkpoint_written")
    right = named and decision in rule.decisions and lost <= intervals * interval
    seconds = None if found is None else found["at"] - injected["at"]
    return Verdict(fault.text, True, None if found is None else found["kind"], seconds, named, decision, lost, right)


def _since(place: int, events: Sequence[Record]) -> list[Record]:
    """The fault's own event and those up to the next one's."""
    found: list[Record] = []
    for event in events:
        its = event["kind"] == "fault_injected"
        if its and event["data"]["injection"] == place:
            found = [event]
        elif found and its:
            break
        elif found:
            found.append(event)
    return found


def _tells(event: Record, rule: Rule, fault: Injection) -> bool:
    if not re.fullmatch(rule.event, event["kind"]) or (rule.by_rank and event["rank"] != fault.rank):
        return False
    return bool(re.search(rule.text, f"{event['message']} {event['data'].get('traceback', '')}"))


def _named(failed: Record | None, rule: Rule, fault: Injection) -> bool:
    if failed is None:
        return not rule.failures or "goes on" in rule.decisions
    said = f"rank {fault.rank} " in failed["message"]
    return failed["data"]["failure"] in rule.failures and (said or not rule.by_rank)


def _decision(after: Sequence[Record]) -> tuple[Decision, int]:
    """What was decided first, and its place; that nothing was, and their end."""
    for place, event in enumerate(after):
        if event["kind"] in _DECISIONS:
            return _DECISIONS[event["kind"]], place
    return "goes on", len(after)


def _steps_lost(after: Sequence[Record], lines: Sequence[Record]) -> int:
    """Steps that had been trained when the next attempt began, and that it trains again."""
    begun = next((event for event in after if event["kind"] == "training_started"), None)
    if begun is None:
        return 0
    trained = max((line["step"] for line in lines if line["attempt"] < begun["attempt"]), default=0)
    return max(0, trained - int(begun["data"]["start_step"]))
