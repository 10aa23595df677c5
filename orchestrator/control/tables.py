"""The tables of runs and checkpoints that verbs print."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from jobs.errors import InputError
from orchestrator.control.display import bytes_text, overall_text, print_table
from orchestrator.manifests import CheckpointManifest
from orchestrator.run_folder import RunFolder
from parallel.layout import Layout


def runs(statuses: list[dict[str, Any]], root: str) -> None:
    if not statuses:
        print(f"no runs under {root}")
        return
    rows = [
        [status["run_id"], status["state"], str(status["attempt"]), str(status["step"]), _label(status), _ago(status)]
        for status in statuses
    ]
    headings = [
        ("run", False),
        ("state", False),
        ("attempt", True),
        ("step", True),
        ("layout", False),
        ("updated", True),
    ]
    print_table(None, headings, rows)


def status(found: dict[str, Any]) -> None:
    reason = f": {found['reason']}" if found.get("reason") else ""
    print(f"{found['run_id']}  {found['state']}{reason}")
    print(f"attempt {found['attempt']}, step {found['step']} of {found['steps']}, layout {_label(found)}")
    spent = "  ".join(f"{heading} {seconds:.1f}" for heading, seconds in found["ledger"].items())
    print(f"seconds {spent}")
    if found["overall"]:
        print(overall_text(found["overall"]))
    print(f"folder  {found['run_folder']}")
    if found["ranks"]:
        print()
        rows = [
            [str(rank["rank"]), str(rank["pid"] or "-"), rank["node"], rank["state"], str(rank["step"])]
            for rank in found["ranks"]
        ]
        print_table(None, [("rank", True), ("pid", True), ("node", False), ("state", False), ("step", True)], rows)


def checkpoints(run: RunFolder, found: Mapping[int, CheckpointManifest | InputError]) -> None:
    """From `manifests.found`."""
    if not found:
        print(f"{run.run_id} has no checkpoint")
        return
    rows = []
    for step, manifest in found.items():
        if isinstance(manifest, InputError):
            rows.append([str(step), "damaged", "-", "-", "-"])
            continue
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.written_at))
        label = Layout.of(manifest.layout).label
        rows.append([str(manifest.step), label, bytes_text(manifest.size_bytes), str(len(manifest.files)), when])
    print_table(None, [("step", True), ("layout", False), ("size", True), ("files", True), ("written", False)], rows)
    for problem in found.values():
        if isinstance(problem, InputError):
            print(problem)


def exported(written: dict[str, Any]) -> None:
    """From `export.export`."""
    millions, size = written["parameters"] / 1e6, bytes_text(written["size_bytes"])
    what = f"{written['run_id']} step {written['step']}: {millions:,.2f} M parameters as {written['family']}"
    print(f"{what}, {len(written['files'])} files, {size}")
    print(written["folder"])


def _label(status: dict[str, Any]) -> str:
    degrees = {axis: degree for axis, degree in status["layout"].items() if axis != "edp"}
    return Layout(**degrees).label


def _ago(status: dict[str, Any]) -> str:
    seconds = max(0.0, time.time() - status["updated_at"])
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
