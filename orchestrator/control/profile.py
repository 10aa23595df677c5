"""`fivefold profile`: this machine measured, its profile written, and what differs from the shipped one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jobs.errors import InputError
from orchestrator.control.display import print_table
from parallel.estimates.hardware import Hardware, read_profile
from parallel.evidence.machine import Measured, grouped_rate
from parallel.evidence.machine_profile import Machine, collected, differences, document, shipped_for


def measure(out: str, seconds: float, *, quiet: bool) -> dict[str, Any]:
    """Measure for about `seconds`, write the profile to `out`, and tell how it differs. Returns the profile's document.

    InputError where `out` cannot be written, before anything is measured.
    """
    path = _checked(out)
    begun = time.monotonic()
    machine, measured = collected(list(_told(seconds, quiet=quiet)))
    found = document(machine, measured, time.strftime("%Y-%m-%d"))
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        _show(machine, measured, read_profile(json.dumps(found), out))
        print(f"\n{out}, in {time.monotonic() - begun:.0f} s; plan with it: cluster.hardware={out}")
    return found


def _checked(out: str) -> Path:
    path = Path(out).expanduser()
    if path.suffix != ".json":
        raise InputError("--out", out, "is a profile, and ends in .json", path.with_suffix(".json"))
    if not path.parent.is_dir():
        raise InputError("--out", out, f"{path.parent} is no folder")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError("--out", out, "cannot be written")
    return path


def _told(seconds: float, *, quiet: bool) -> Iterator[dict[str, Any]]:
    """The JSON lines of the process that measures; InputError with what it printed where it measures nothing."""
    command = [sys.executable, "-m", "orchestrator.worker.profiling", str(seconds)]
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
                progress.update(task, description=line.get("doing", progress.tasks[0].description))
                yield line
        if process.wait() != 0:
            errors.seek(0)
            raise InputError("environment", None, f"this machine cannot be measured:\n{errors.read()[-4000:]}")


def _show(machine: Machine, measured: Measured, here: Hardware) -> None:
    shipped, same = shipped_for(machine)
    print(f"machine  {machine.described}; {machine.count} {'GPUs' if machine.kind == 'cuda' else 'ranks'}")
    if not same:
        print(f"         has no shipped profile; what was not measured is {shipped.name}'s, the nearest")
    for part, why in measured.failed.items():
        print(f"NOT MEASURED  {part}: {why}")
    print()
    rows = []
    for each in differences(here, shipped):
        change = f"{each.here / each.shipped - 1:+.0%}" if each.shipped else ""
        rows.append([each.name, f"{each.shipped:.4g}", f"{each.here:.4g}", change])
    print_table(None, [("", False), (f"shipped {shipped.name}", True), ("here", True), ("differs", True)], rows)
    rate = grouped_rate(measured, here)
    if rate is not None:
        print(f"\ngrouped products run at {rate:.0%} of what this profile predicts of them")
