"""A process of its own that measures this machine, and tells of it a line at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jobs.errors import InputError


def writable(out: str, rule: str) -> Path:
    """The path of `--out`. InputError where it cannot be written, before anything is measured."""
    path = Path(out).expanduser()
    if path.suffix != ".json":
        raise InputError("--out", out, rule, path.with_suffix(".json"))
    if not path.parent.is_dir():
        raise InputError("--out", out, f"{path.parent} is no folder")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError("--out", out, "cannot be written")
    return path


def told(package: str, arguments: Sequence[str], *, quiet: bool) -> Iterator[dict[str, Any]]:
    """JSON lines of `python -m orchestrator.worker.{package}`; InputError with what it printed where it fails."""
    command = [sys.executable, "-m", f"orchestrator.worker.{package}", *arguments]
    columns = (SpinnerColumn(), TextColumn("measuring {task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)
    with (
        tempfile.TemporaryFile("w+") as errors,
        progress,
        # A rate is that of one core, however many threads the caller's environment asks for.
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ) as process,
    ):
        task = progress.add_task("this machine")
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith("{"):
                line = json.loads(text)
                if "doing" in line:
                    progress.update(task, description=line["doing"])
                    if not (quiet or progress.console.is_terminal):
                        print(f"measuring {line['doing']}", file=sys.stderr, flush=True)
                yield line
        if process.wait() != 0:
            errors.seek(0)
            raise InputError("environment", None, f"this machine cannot be measured:\n{errors.read()[-4000:]}")
