"""`fivefold exact`: a job's layout held against the oracle, on a model small enough for this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from jobs.errors import InputError
from jobs.spec import JobSpec
from orchestrator.control.display import print_table
from parallel.layout import Layout
from parallel.shrink import Shrunk

_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
_KINDS = (
    ("losses", "loss of a step"),
    ("grad_norms", "gradient norm of a step"),
    ("weights", "a final weight's tensor"),
)


def check(job: JobSpec, shrunk: Shrunk, *, quiet: bool) -> dict[str, Any]:
    """Train the small job by its engine and by the oracle; returns the verdict, and prints how it goes."""
    if not quiet:
        _opening(job, shrunk)
    oracle: dict[str, Any] = {}
    for facts in _told(shrunk.job):
        if "seed" in facts:
            oracle = facts
        elif "step" in facts and not quiet:
            at = facts["step"] - 1
            pair = (facts["loss"], oracle["losses"][at], facts["grad_norm"], oracle["grad_norms"][at])
            print(f"{facts['step']:>7}  {pair[0]:.6f}  {pair[1]:.6f}  {pair[2]:9.5f}  {pair[3]:9.5f}", flush=True)
        elif "verdict" in facts:
            verdict: dict[str, Any] = facts["verdict"]
    changes = {change.path: {"before": change.before, "after": change.after} for change in shrunk.changes}
    found = {"job": job.name, "engine": job.engine, "seed": oracle["seed"], "changes": changes, **verdict}
    if not quiet:
        _closing(shrunk.job, verdict)
    return found


def _opening(job: JobSpec, shrunk: Shrunk) -> None:
    small = Layout.of(shrunk.job.layout)
    print(f"job     {job.name} by {job.engine} at {Layout.of(job.layout).label}")
    for part in ("model", "layout", "train"):
        changed = [change for change in shrunk.changes if change.path.startswith(f"{part}.")]
        texts = [f"{change.path.removeprefix(f'{part}.')} {change.before} -> {change.after}" for change in changed]
        print(f"{'shrunk' if part == 'model' else '':<8}{part}: {', '.join(texts) or 'as it is'}")
    print(f"here    {small.label} on {small.world} CPU ranks in fp32, whatever the job's precision; random tokens")
    print("oracle  the reference model on one rank in fp64, from the same weights")
    print(f"{'step':>7}  {'loss':>8}  {'oracle':>8}  {'grad norm':>9}  {'oracle':>9}", flush=True)


def _closing(small: JobSpec, verdict: dict[str, Any]) -> None:
    print()
    rows = []
    for key, name in _KINDS:
        found = verdict[key]
        holds = "exact" if found["largest"] <= found["bar"] else "NOT EXACT"
        rows.append([name, f"{found['largest']:.1e}", f"{found['bar']:.0e}", holds, found["where"]])
    headings = [("largest relative deviation", False), ("", True), ("bar", True), ("", False), ("at", False)]
    print_table(None, headings, rows)
    print()
    what = f"{small.name}, made small, at {Layout.of(small.layout).label}"
    if verdict["exact"]:
        print(f"exact: {what} trains as on one device")
    else:
        print(f"NOT EXACT: {what} is another training run than on one device")


def _told(job: JobSpec) -> Iterator[dict[str, Any]]:
    """The JSON lines of the process that trains; InputError with what it printed where it fails."""
    command = [sys.executable, "-m", "orchestrator.worker.exactness"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | _ENVIRONMENT,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(job.model_dump_json())
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait() != 0:
            errors.seek(0)
            raise InputError("layout", Layout.of(job.layout).label, f"the engine failed:\n{errors.read()[-4000:]}")
