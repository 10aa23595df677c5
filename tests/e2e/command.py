"""`fivefold` as a user runs it: in processes of their own, all of which can be found again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.run_folder import RunFolder, runs

PROJECT = Path(__file__).resolve().parents[2]
JOB = str(Path(__file__).with_name("small.yaml"))
STEPS, INTERVAL = 16, 4
"""train.steps and checkpoint.interval of JOB."""


@dataclass(frozen=True)
class Answer:
    code: int
    document: Any
    """What --json printed."""
    told: str
    """What went to stderr."""


class Started:
    """One command line, running, in a process group of its own as a shell would give it."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str], output: Path) -> None:
        self._out, self._told = output.with_suffix(".out"), output.with_suffix(".err")
        with self._out.open("wb") as out, self._told.open("wb") as told:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.cli", *arguments, "--json"],
                stdout=out,
                stderr=told,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=output.parent,
                start_new_session=True,
            )

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def finish(self, seconds: float = 90) -> Answer:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not finished within {seconds} s; it told:\n{self._told.read_text()[-4000:]}")
        printed, told = self._out.read_text(), self._told.read_text()
        try:
            return Answer(code, json.loads(printed), told)
        except json.JSONDecodeError:
            pytest.fail(f"exit code {code} with no JSON document; stdout:\n{printed[-2000:]}\nstderr:\n{told[-4000:]}")


class Fivefold:
    """Verbs against one run root. Every process that comes of them carries `mark` in its environment."""

    def __init__(self, folder: Path, mark: str, environment: dict[str, str], root: str | None = None) -> None:
        self.folder, self.mark, self.root = folder, mark, root or str(folder / "runs")
        ours = {"FIVEFOLD_RUN_ROOT": self.root, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", mark: "1"}
        self.environment = os.environ | environment | ours
        self._count = 0

    def start(self, *arguments: str) -> Started:
        self._count += 1
        return Started(arguments, self.environment, self.folder / f"{self._count}")

    def __call__(self, *arguments: str, seconds: float = 90) -> Answer:
        return self.start(*arguments).finish(seconds)

    def ask(self, *arguments: str) -> Answer:
        """The same in this process, for verbs that only read or leave a word: it saves the start of one."""
        out, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
            code = cli.run([*arguments, "--run-root", self.root, "--json"])
        return Answer(code, json.loads(out.getvalue()), told.getvalue())

    def run_of(self, started: Started) -> RunFolder:
        """The run that a command just started has created: the only one under this run root."""
        return until(lambda: next(iter(runs(self.root)), None), 20, "a run folder", started)

    def survivors(self, seconds: float, but: tuple[str, ...] = ()) -> list[str]:
        """Command lines of processes still there after so long, but for those that begin like this."""
        deadline = time.monotonic() + seconds
        while True:
            alive = [command for _, command in self._alive() if not (but and command.startswith(but))]
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.05)

    def end_all(self) -> None:
        for pid, _ in self._alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _alive(self) -> Iterator[tuple[int, str]]:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"\0{self.mark}=1\0".encode() in b"\0" + (process / "environ").read_bytes():
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if command:
                        yield int(process.name), command


Opened = Callable[..., AbstractContextManager[Fivefold]]
"""`opened(root, **environment)`: a `Fivefold` for a while."""


def until(condition: Callable[[], Any], seconds: float, what: str, started: Started | None = None) -> Any:
    """What `condition` returns once it is true; the test fails after `seconds`, or when `started` has ended."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if started is not None and started.process.poll() is not None:
            pytest.fail(f"ended while waiting for {what}: {started.finish()}")
        if time.monotonic() > deadline:
            pytest.fail(f"no {what} within {seconds} s")
        time.sleep(0.01)
    return found


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    return list(run.read_lines("metrics.jsonl"))


def reached(run: RunFolder, step: int, attempt: int = 1) -> Callable[[], bool]:
    return lambda: any(line["step"] >= step and line["attempt"] >= attempt for line in metrics(run))


def numbers(line: dict[str, Any]) -> tuple[float, float]:
    return line["loss"], line["grad_norm"]


def kinds(run: RunFolder) -> list[str]:
    return [event["kind"] for event in run.read_lines("events.jsonl")]


def assert_same_curve(run: RunFolder, reference: dict[int, tuple[float, float]]) -> None:
    """Every step is there, and each time that it was trained it came to the same bits."""
    lines = metrics(run)
    assert {line["step"] for line in lines} == set(reference)
    different = [line for line in lines if numbers(line) != reference[line["step"]]]
    assert not different, f"{[(line['attempt'], line['step'], numbers(line)) for line in different]}"


def kill_rank(run: RunFolder, rank: int, number: signal.Signals = signal.SIGKILL) -> float:
    """A signal from outside; returns when, in Unix seconds."""
    (pid,) = [each["pid"] for each in run.read_json("status.json")["ranks"] if each["rank"] == rank]
    os.kill(pid, number)
    return time.time()


def seconds_to_next_step(run: RunFolder, killed_at: float, attempt: int) -> float:
    """From a kill to the end of the first step of the attempt after it."""
    return min(line["at"] for line in metrics(run) if line["attempt"] == attempt) - killed_at
