"""What a person sees of a run: one aligned line a step, recoveries as they happen, a summary at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from jobs.spec import JobSpec
from orchestrator.messages import Event

HEADER = f"{'step':>7}  {'loss':>8}  {'grad norm':>9}  {'tokens/s':>9}  {'MFU':>5}  {'memory':>8}"
_TOLD = {
    "nodes_requested",
    "nodes_ready",
    "memory_planned",
    "memory_unplanned",
    "memory_checked",
    "checkpoint_damaged",
    "fault_injected",
    "attempt_failed",
    "restarting",
    "stopping",
    "activations_stayed",
    "activations_swapped",
}
_LOUD = {"checkpoint_damaged", "fault_injected", "attempt_failed"}


class _Console(Console):
    def __init__(self, file: IO[str] | None, needs_reader: bool) -> None:
        super().__init__(file=file, highlight=False)
        self._needs_reader = needs_reader

    def on_broken_pipe(self) -> None:
        """When the reader has had enough (`... | head`), what only prints ends, and training goes on unseen."""
        if self._needs_reader:
            raise BrokenPipeError
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Display:
    """Listens to a run and prints it. On a terminal a progress bar with the time left stands below the lines."""

    def __init__(self, file: IO[str] | None = None, *, needs_reader: bool = False) -> None:
        self._console = _Console(file, needs_reader)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._header_due = True

    def opening(self, run_place: str, job: JobSpec, plan_line: str) -> None:
        model, train = job.model, job.train
        self._print(f"run     {run_place}")
        experts = f", {model.experts} experts, top {model.top_k}" if model.is_moe else ""
        self._print(f"model   {model.name}: {model.layers} layers, hidden {model.hidden}{experts}")
        self._print(f"layout  {plan_line}")
        batch = f"{train.global_batch} x {train.sequence_length} tokens a step"
        self._print(f"train   {train.steps} steps, {batch}, {train.precision}")
        if self._console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("left"), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("train", total=train.steps)
            self._progress.start()

    def __call__(self, told: Event | dict[str, Any]) -> None:
        if isinstance(told, dict):
            self._step(told)
        elif told.kind == "training_started":
            self._header_due = True
            start = told.data["start_step"]
            if self._progress is not None and self._task is not None:
                self._progress.reset(self._task, completed=start)
            kept = "snapshot in memory" if told.data["from_memory"] else "checkpoint"
            begins = f"the {kept} of step {start}" if start else told.data["init_from"] or "random weights"
            self._print(f"        {told.data['parameters'] / 1e6:,.2f} M parameters, from {begins}")
        elif told.kind in _TOLD:
            self._header_due |= told.kind == "attempt_failed"
            style = "bold red" if told.kind in _LOUD else None
            self._print(f"{time.strftime('%H:%M:%S', time.localtime(told.at))}  {told.message}", style)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summary(self, facts: dict[str, Any]) -> None:
        """The last lines of a run, from `summary` of session.py."""
        self.close()
        self._print("")
        self._print(f"{facts['state']}: {facts['reason']}", "bold green" if facts["state"] == "done" else "bold red")
        if facts["loss_last"] is not None:
            against = ""
            if facts["unigram_entropy"] is not None:
                side = "under" if facts["loss_last"] < facts["unigram_entropy"] else "above"
                against = f", {side} the text's unigram entropy of {facts['unigram_entropy']:.4f} nats"
            self._print(f"loss    {facts['loss_first']:.4f} -> {facts['loss_last']:.4f}{against}")
        if facts["validation_loss"] is not None:
            self._print(f"        {facts['validation_loss']:.4f} on text held out of training")
        seconds = "  ".join(f"{heading} {spent:.1f}" for heading, spent in facts["ledger"].items())
        self._print(f"seconds {seconds}  = {sum(facts['ledger'].values()):.1f}")
        if facts["overall"]:
            self._print(overall_text(facts["overall"]))
        self._print(f"folder  {facts['run_folder']}" + ("  (loss.png has the curve)" if facts["loss_plot"] else ""))

    def _step(self, line: dict[str, Any]) -> None:
        if self._header_due:
            self._print(HEADER, "bold")
            self._header_due = False
        mfu = f"{line['mfu']:.1%}" if line.get("mfu") is not None else "-"
        text = (
            f"{line['step']:>7}  {line['loss']:>8.4f}  {line['grad_norm']:>9.4f}  {line['tokens_per_second']:>9,.0f}  "
            f"{mfu:>5}  {bytes_text(line['memory_bytes']):>8}"
        )
        if "validation_loss" in line:
            text += f"  validation {line['validation_loss']:.4f}"
        self._print(text)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=line["step"])

    def _print(self, text: str, style: str | None = None) -> None:
        console = self._progress.console if self._progress is not None else self._console
        console.print(text, style=style, markup=False, soft_wrap=True)


def print_table(
    title: str | None, columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]], file: IO[str] | None = None
) -> None:
    """A plain table; columns are (heading, whether it holds numbers)."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading, numeric in columns:
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        table.add_row(*row)
    width = None if Console(file=file).is_terminal else 160
    Console(file=file, highlight=False, soft_wrap=False, width=width).print(table)


def overall_text(overall: dict[str, float]) -> str:
    """Of a run's whole time, restarts and waits with it: `goodput 82.1%, 9,120 tokens/s, MFU 31.0%`."""
    parts = [f"goodput {overall['goodput']:.1%}"]
    if "tokens_per_second" in overall:
        parts.append(f"{overall['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in overall:
        parts.append(f"MFU {overall['mfu']:.1%}")
    return f"{', '.join(parts)} over all its time"


def bytes_text(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
