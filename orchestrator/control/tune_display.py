"""What a person sees of a tune: a line a trial, a bar on a terminal, and a table of predicted against measured."""

from __future__ import annotations

from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.spec import JobSpec
from orchestrator.control.display import Display, print_table
from orchestrator.control.measured import Measured
from orchestrator.control.tune import Candidate, Limits, Tuning
from orchestrator.messages import Event


class TuneDisplay:
    """Listens to a tune. `of_trials` listens to its runs, whose own lines are left to `fivefold logs`."""

    def __init__(self, limits: Limits, file: IO[str]) -> None:
        self._console, self._limits = Console(file=file, highlight=False), limits
        columns = (TextColumn("{task.description}"), TextColumn("step"), MofNCompleteColumn(), BarColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
        self._bar = self._progress.add_task("", total=limits.steps)
        self.of_trials = _OfTrial(self)

    def begins(self, tuning: Tuning) -> None:
        cluster, number = tuning.job.cluster, len(tuning.plans)
        where = f"{cluster.nodes} x {cluster.devices_per_node} {cluster.hardware}"
        self._print(f"tune    {tuning.job.name} on {where}: {number} candidates of {tuning.fitting} that fit")
        if tuning.store.rows:
            known = (
                f"{len(tuning.store.rows)} layouts measured before on these devices, {tuning.trials} of them of these"
            )
            self._print(f"known   {known}")

    def trial_begins(self, candidate: Candidate, number: int) -> None:
        if self._console.is_terminal:
            self._progress.reset(self._bar, description=f"trial {number}/{self._limits.trials}  {candidate.label}")
            self._progress.start()

    def step(self) -> None:
        self._progress.advance(self._bar)

    def trial_ended(self, candidate: Candidate, row: Measured, number: int) -> None:
        if self._console.is_terminal:
            self._progress.stop()
        found = (
            row.outcome if row.seconds is None else f"{_ms(row.seconds)} ({_off(row.believed_seconds, row.seconds)})"
        )
        predicted = f"predicted {_ms(row.believed_seconds):>9}"
        line = f"trial {number}/{self._limits.trials}  {candidate.label:<18} {predicted}  {found}"
        self._print(line, None if row.seconds else "bold red")
        if row.reason:
            self._print(f"           {row.reason}")

    def summary(self, tuning: Tuning, reason: str, command: str | None) -> None:
        self._print(f"\nstopped: {reason}\n")
        rows = [_row(each) for each in tuning.candidates]
        names = ("profile alone", "error", "when run", "error", "measured", "now", "nine of ten")
        print_table(None, [("layout", False), *((name, True) for name in names)], rows, self._console.file)
        if command is None:
            self._print("\nno layout ran: `fivefold logs RUN` tells what each trial said", "bold red")
        else:
            best = tuning.best
            assert best is not None
            self._print(f"\nchosen  {best.label}, {_ms(best.seconds)} a step. Train with it:\n{command}")

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, soft_wrap=True)


class _OfTrial(Display):
    """Of an ordinary run only its steps are counted."""

    def __init__(self, tuned: TuneDisplay) -> None:
        self._tuned = tuned

    def opening(self, run_place: str, job: JobSpec, plan_line: str) -> None:
        pass

    def __call__(self, told: Event | dict[str, Any]) -> None:
        if isinstance(told, dict):
            self._tuned.step()

    def close(self) -> None:
        pass

    def summary(self, facts: dict[str, Any]) -> None:
        pass


def _row(each: Candidate) -> list[str]:
    row = each.row
    now = [_ms(each.seconds), f"{_ms(each.interval[0])} .. {_ms(each.interval[1])}"]
    if row is None or row.seconds is None:
        risk = f"P(out of memory) {each.p_out_of_memory:.0%}" if each.p_out_of_memory > 0.05 else "-"
        return [each.label, _ms(each.profile_seconds), "-", "-", "-", row.outcome if row else risk, *now]
    return [
        each.label,
        _ms(each.profile_seconds),
        _off(each.profile_seconds, row.seconds),
        _ms(row.believed_seconds),
        _off(row.believed_seconds, row.seconds),
        _ms(row.seconds),
        *now,
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def _off(predicted: float, measured: float) -> str:
    """How far a prediction is from what was measured: `-12%` is too short."""
    return f"{predicted / measured - 1:+.0%}"
