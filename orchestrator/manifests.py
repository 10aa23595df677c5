"""Checkpoints as the run folder tells of them: a folder with a manifest, written last. No manifest, no checkpoint."""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.architecture import ModelArchitecture
from jobs.errors import InputError
from jobs.spec import JobSpec, LayoutSpec
from orchestrator.messages import StepReport
from orchestrator.run_folder import RunFolder

FORMAT = 1
_CHUNK_BYTES = 1 << 22


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size_bytes: int
    sha256: str


class CheckpointManifest(BaseModel):
    """What a checkpoint is and how to tell that it is whole."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")  # reports may hold NaN

    format: int = FORMAT
    run_id: str
    attempt: int
    step: int
    engine: str
    layout: LayoutSpec
    model: ModelArchitecture
    data_cursor: int
    """Samples consumed; with the seed it decides every sample still to come."""
    random_state: dict[str, int]
    """{seed, step}: every generator is seeded anew from both at each step, so this is all of its state."""
    written_at: float
    reports: tuple[StepReport, ...]
    """Rank 0's, of the steps since the checkpoint before: with no controller to hear them, they are told here."""
    files: tuple[FileEntry, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def folder_name(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


def steps(run: RunFolder) -> list[int]:
    """Steps that have a manifest, newest first."""
    folders = [name for name in run.names("checkpoints") if name.startswith("step-") and name[5:].isdigit()]
    found = [int(name[5:]) for name in folders if run.exists(f"checkpoints/{name}/manifest.json")]
    return sorted(found, reverse=True)


def read(run: RunFolder, step: int) -> CheckpointManifest:
    """The manifest of a step. InputError where there is none or it cannot be understood."""
    name = f"{folder_name(step)}/manifest.json"
    record = run.read_json(name)
    if record is None:
        nearest = min(steps(run), key=lambda other: abs(other - step), default=None)
        raise InputError("checkpoint", step, f"{run.run_id} has no such checkpoint", nearest)
    written = record.get("format") if isinstance(record, dict) else None
    if written != FORMAT:
        rule = f"is of checkpoint format {written}; this version reads format {FORMAT}"
        raise InputError(run.path(name), None, rule)
    try:
        return CheckpointManifest.model_validate(record)
    except ValidationError as error:
        raise InputError(run.path(name), None, f"is not a manifest: {error.errors()[0]['msg']}") from None


def check_job(manifest: CheckpointManifest, job: JobSpec, place: str) -> None:
    """Refuse a checkpoint of another engine, or of another model: then naming every field that differs but the name."""
    if manifest.engine != job.engine:
        rule = f"is a checkpoint of the {manifest.engine} engine, which the {job.engine} engine does not read"
        raise InputError(f"{place}/{folder_name(manifest.step)}", None, rule)
    theirs, ours = manifest.model.model_dump(), job.model.model_dump()
    differing = [key for key in ours if key != "name" and theirs[key] != ours[key]]
    if differing:
        detail = ", ".join(f"{key} {theirs[key]} there, {ours[key]} here" for key in differing)
        raise InputError(f"{place}/{folder_name(manifest.step)}", None, f"is a checkpoint of another model: {detail}")


def digest(file: Any) -> str:
    """SHA-256 of an open binary file, in hexadecimal."""
    found = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        found.update(chunk)
    return found.hexdigest()


def damage(run: RunFolder, step: int, entry: FileEntry) -> str | None:
    """What is wrong with a file of a checkpoint, or None. Reads all of it."""
    name = f"{folder_name(step)}/{entry.name}"
    size = run.size(name)
    if size is None:
        return f"{name} is missing"
    if size != entry.size_bytes:
        return f"{name} has {size} bytes, {entry.size_bytes} were written"
    with run.open(name) as file:
        found = digest(file)
    return None if found == entry.sha256 else f"{name} has SHA-256 {found[:12]}, {entry.sha256[:12]} was written"


def prune(run: RunFolder, keep: int) -> list[int]:
    """Remove all but the newest `keep` checkpoints; the manifest goes first, so that no half checkpoint looks whole."""
    surplus = steps(run)[keep:]
    for step in surplus:
        run.remove(f"{folder_name(step)}/manifest.json")
        run.remove(folder_name(step))
    return surplus
