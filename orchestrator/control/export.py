"""A run's checkpoint as a folder that other software reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.errors import InputError, closest
from models.huggingface_names import family
from orchestrator import manifests
from orchestrator.manifests import CheckpointManifest
from orchestrator.run_folder import RunFolder

FORMATS = ("huggingface",)


def export(run: RunFolder, format: str, step: int | None, to: str | None) -> dict[str, Any]:
    """Write the checkpoint of `step`, by default the newest whole one, into the folder `to`. It is whole or not there.

    InputError for a format that is not known, a checkpoint that is missing or damaged, a model that the format cannot
    hold, and a folder with something in it. RuntimeError where the writer fails, which says why on stderr.
    """
    if format not in FORMATS:
        rule = f"is not one of {', '.join(FORMATS)}"
        raise InputError("--format", format, rule, closest(format, FORMATS) or FORMATS[0])
    steps = _steps(run, step)
    kind = family(manifests.read(run, step or steps[0]).model)
    if to:
        _check_free(Path(to).expanduser())
    wanted = whole_checkpoint(run, step)
    folder = Path(to or f"{run.run_id}-step-{wanted.step}").expanduser().absolute()
    _check_free(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        rule = "is there: another export, or one that was killed" if partial.exists() else str(error.strerror)
        raise InputError("--to", str(partial), rule, f"{folder}-2") from None
    try:
        command = [sys.executable, "-m", "orchestrator.worker.export", run.place, str(wanted.step), str(partial)]
        code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
        if code:
            raise RuntimeError(f"nothing was exported: the writer ended with exit code {code}")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {
        "run_id": run.run_id,
        "step": wanted.step,
        "format": format,
        "family": kind.model_type,
        "folder": str(folder),
        "parameters": wanted.model.parameters,
        "size_bytes": sum(files.values()),
        "files": files,
    }


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError("--to", str(folder), "is a file", f"{folder}-2")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError("--to", str(folder), "is not empty", f"{folder}-2")


def whole_checkpoint(run: RunFolder, step: int | None) -> CheckpointManifest:
    """The manifest of `step`, or of the newest that is whole; InputError where there is none, or it is damaged."""
    steps = _steps(run, step)
    return _newest_whole(run, steps) if step is None else _whole(run, step, steps)


def _steps(run: RunFolder, step: int | None) -> list[int]:
    steps = manifests.steps(run)
    if not steps:
        raise InputError("checkpoint", step, f"{run.run_id} has none")
    return steps


def _newest_whole(run: RunFolder, steps: Sequence[int]) -> CheckpointManifest:
    for step in steps:
        manifest = manifests.read(run, step)
        problems = _problems(run, manifest)
        if not problems:
            return manifest
        print(f"checkpoint at step {step} is damaged and left aside: {'; '.join(problems)}", file=sys.stderr)
    raise InputError("checkpoint", ", ".join(map(str, steps)), "none of them is whole")


def _whole(run: RunFolder, step: int, steps: Sequence[int]) -> CheckpointManifest:
    manifest = manifests.read(run, step)
    problems = _problems(run, manifest)
    if problems:
        whole = (other for other in steps if other != step and not _problems(run, manifests.read(run, other)))
        raise InputError("checkpoint", step, f"is damaged: {'; '.join(problems)}", next(whole, None))
    return manifest


def _problems(run: RunFolder, manifest: CheckpointManifest) -> list[str]:
    return [text for entry in manifest.files if (text := manifests.damage(run, manifest.step, entry))]
