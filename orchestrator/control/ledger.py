"""Where a run's time went: every second under exactly one heading, summing to the time that the run was active.

It is an account of intervals: a mark moves forward through the timestamps it is fed, and each interval it passes over
is booked once. Nothing is measured twice, so nothing can fail to add up.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

Heading = Literal["productive", "rework", "stall", "detect", "restart", "queue"]
"""productive: steps trained for the first time; rework: steps trained again, or cut short by a fault; stall: a step's
wait for data or a checkpoint; detect: a fault not yet acted on; restart: from a fault to the next step; queue: waiting
for devices."""

HEADINGS: tuple[Heading, ...] = get_args(Heading)


class Ledger:
    """The account of one run. Timestamps are Unix seconds, which outlive a process; a clock set back books 0."""

    def __init__(self, start: float) -> None:
        """A run that begins at `start`, waiting for its devices."""
        self._seconds: dict[Heading, float] = dict.fromkeys(HEADINGS, 0.0)
        self._heading: Heading = "queue"
        self._mark: float | None = start
        self._highest_step = 0
        self.tokens = 0
        """Trained for the first time."""

    def switch(self, heading: Heading, at: float) -> None:
        """From `at` on, time belongs to `heading`. A step that a fault cuts short is lost, and so counts as rework."""
        lost = self._heading == "productive" and heading in ("detect", "restart")
        self._book("rework" if lost else self._heading, at)
        self._heading = heading

    def step(self, step: int, at: float, stall_seconds: float, tokens: int = 0) -> None:
        """`step` was completed at `at`: the time since the last mark is its stall, and productive or rework."""
        self.tokens += tokens if step > self._highest_step else 0
        self._heading = "rework" if step <= self._highest_step else "productive"
        self.stall(at, stall_seconds)
        self._highest_step = max(step, self._highest_step)
        self._heading = "productive"

    def stall(self, at: float, seconds: float) -> None:
        """Up to `at` training waited `seconds`, for a checkpoint; the time before them is the present heading's."""
        stalled = min(max(seconds, 0.0), self._elapsed(at))
        self._seconds["stall"] += stalled
        self._book(self._heading, at, already=stalled)

    def pause(self, at: float) -> None:
        """The run was ended on purpose (done, cancelled, interrupted, failed): time stops until it is resumed."""
        self._book(self._heading, at)
        self._mark = None

    def totals(self, now: float) -> dict[Heading, float]:
        """Seconds by heading up to `now`, the interval that is still open under the heading of the moment."""
        totals = dict(self._seconds)
        totals[self._heading] += self._elapsed(now)
        return totals

    def as_dict(self) -> dict[str, Any]:
        """What `ledger.json` holds: the booked seconds, and what `resumed` needs to go on."""
        return {
            "seconds": dict(self._seconds),
            "heading": self._heading,
            "mark": self._mark,
            "highest_step": self._highest_step,
            "tokens": self.tokens,
        }

    @classmethod
    def resumed(cls, saved: dict[str, Any], at: float) -> Ledger:
        """The ledger of `as_dict`, taken up again at `at`, with the run restarting.

        The time since then is left out if it was paused; else its controller crashed, and that time is `restart`.
        """
        ledger = cls(at if saved["mark"] is None else saved["mark"])
        ledger._seconds.update(saved["seconds"])
        ledger._highest_step, ledger.tokens = saved["highest_step"], saved["tokens"]
        ledger._heading = "restart"
        ledger._book("restart", at)
        return ledger

    def _elapsed(self, at: float) -> float:
        return 0.0 if self._mark is None else max(at - self._mark, 0.0)

    def _book(self, heading: Heading, at: float, already: float = 0.0) -> None:
        if self._mark is None:
            raise ValueError("the ledger is paused: resume it before booking time")
        elapsed = self._elapsed(at)
        self._seconds[heading] += elapsed - already
        self._mark += elapsed
