"""Checkpoints as the run folder tells of them: a folder with a manifest, written last. No manifest, no checkpoint.

A manifest names every file with its size and hash, and carries a hash of itself, its seal: a checkpoint that is not all
there, or not as it was written, is seen to be damaged before anything of it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from jobs.architecture import ModelArchitecture
from jobs.errors import InputError
from jobs.spec import CheckpointSpec, JobSpec, LayoutSpec
from orchestrator.files import FileEntry
from orchestrator.messages import StepReport
from orchestrator.run_folder import RunFolder

FORMAT = 2
VERSION = "0.1.0"
"""Of Fivefold, told in a manifest, so that an older one can say which version reads it."""
_CHUNK_BYTES = 1 << 22


class DamagedError(InputError):
    """A manifest that is not as it was written: another checkpoint is to be used."""


class CheckpointManifest(BaseModel):
    """What a checkpoint is and how to tell that it is whole."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")  # reports may hold NaN

    format: int = FORMAT
    fivefold: str = VERSION
    seal: str = ""
    """SHA-256 of the file with this empty; `write` fills it."""
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
    def validation_loss(self) -> float | None:
        """The newest of its reports, nats; None where no step since the checkpoint before was evaluated."""
        losses = (report.validation_loss for report in reversed(self.reports))
        return next((loss for loss in losses if loss is not None), None)

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


def write(run: RunFolder, manifest: CheckpointManifest) -> CheckpointManifest:
    """Make a checkpoint of files that are all there; returns the manifest with its seal."""
    unsealed = manifest.model_copy(update={"seal": ""})
    sealed = unsealed.model_copy(update={"seal": _seal(_encoded(unsealed))})
    run.write(f"{folder_name(manifest.step)}/manifest.json", _encoded(sealed))
    return sealed


def read(run: RunFolder, step: int) -> CheckpointManifest:
    """The manifest of a step. DamagedError where it is not as it was written, InputError where there is none.

    InputError too where it is of another format, which says of which version of Fivefold.
    """
    name = f"{folder_name(step)}/manifest.json"
    try:
        content = run.read(name)
    except FileNotFoundError:
        nearest = min(steps(run), key=lambda other: abs(other - step), default=None)
        raise InputError("checkpoint", step, f"{run.run_id} has no such checkpoint", nearest) from None
    try:
        record = json.loads(content)
    except ValueError as error:
        raise DamagedError(run.path(name), None, f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DamagedError(run.path(name), None, "is not a manifest")
    written = record.get("format")
    if isinstance(written, int) and written != FORMAT:
        by = f", which fivefold {record['fivefold']} wrote and reads" if "fivefold" in record else ""
        rule = f"is of checkpoint format {written}{by}; this version, {VERSION}, reads format {FORMAT}"
        raise InputError(run.path(name), None, rule)
    try:
        manifest = CheckpointManifest.model_validate(record)
    except ValidationError as error:
        raise DamagedError(run.path(name), None, f"is not a manifest: {error.errors()[0]['msg']}") from None
    if manifest.step != step:
        raise DamagedError(run.path(name), None, f"is the manifest of step {manifest.step}")
    if not manifest.seal or manifest.seal != _seal(content.replace(_field(manifest.seal), _field(""), 1)):
        raise DamagedError(run.path(name), None, "is not as it was written: its seal does not fit it")
    return manifest


def found(run: RunFolder) -> dict[int, CheckpointManifest | DamagedError]:
    """By step, newest first: each manifest, or what is wrong with it. InputError for one of another format."""
    known: dict[int, CheckpointManifest | DamagedError] = {}
    for step in steps(run):
        try:
            known[step] = read(run, step)
        except DamagedError as error:
            known[step] = error
    return known


def whole(run: RunFolder) -> list[CheckpointManifest]:
    """The manifests that are as they were written, newest first; whoever loads one of the others tells of it."""
    return [manifest for manifest in found(run).values() if isinstance(manifest, CheckpointManifest)]


def verified(run: RunFolder, step: int) -> tuple[CheckpointManifest | None, list[str]]:
    """The manifest of a step, None where it is damaged, and what is wrong with the checkpoint. Reads all of it."""
    try:
        manifest = read(run, step)
    except DamagedError as error:
        return None, [str(error)]
    return manifest, [text for entry in manifest.files if (text := damage(run, step, entry))]


def _encoded(manifest: CheckpointManifest) -> bytes:
    return manifest.model_dump_json(indent=1).encode()


def _field(seal: str) -> bytes:
    return f'"seal": "{seal}"'.encode()


def _seal(unsealed: bytes) -> str:
    return hashlib.sha256(unsealed).hexdigest()


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


def surplus(found: Sequence[CheckpointManifest], spec: CheckpointSpec) -> list[int]:
    """Steps whose checkpoints are kept for no reason. Of `found`, the newest is always kept."""
    ordered = sorted(found, key=lambda manifest: -manifest.step)
    kept = {manifest.step for manifest in ordered[: spec.keep]}
    if spec.keep_every:
        kept |= {manifest.step for manifest in ordered if manifest.step % spec.keep_every == 0}
    losses = [(manifest.validation_loss, manifest.step) for manifest in ordered]
    judged = sorted((loss, step) for loss, step in losses if loss is not None and math.isfinite(loss))
    kept |= {step for _, step in judged[: spec.keep_best]}
    return [manifest.step for manifest in ordered if manifest.step not in kept]


def prune(run: RunFolder, spec: CheckpointSpec) -> list[int]:
    """Remove what `surplus` names. What is damaged counts for nothing, and stays to be looked at."""
    removed = surplus(whole(run), spec)
    for step in removed:
        remove(run, step)
    return removed


def remove(run: RunFolder, step: int) -> None:
    """The manifest goes first, so that no half checkpoint looks whole."""
    run.remove(f"{folder_name(step)}/manifest.json")
    run.remove(folder_name(step))
