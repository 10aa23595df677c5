"""Saving and restoring one run's checkpoints from its ranks. Collective: every rank calls, in the same order.

Every rank writes files through its engine, which are hashed as they are written; rank 0 writes the manifest last. For
an object store each node stages its files on its own disk: training goes on once they are there, uploads.py sends them.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from jobs.errors import InputError
from orchestrator import manifests
from orchestrator.files import FileEntry, Hook, unhindered
from orchestrator.manifests import CheckpointManifest, DamagedError
from orchestrator.messages import RankLaunch, StepReport
from orchestrator.run_folder import RunFolder
from orchestrator.worker.engines.protocol import Engine
from orchestrator.worker.reporter import Reporter
from orchestrator.worker.uploads import Staged, Uploads
from parallel.layout import Layout


class Checkpoints:
    """before: told of every change to a disk or a store that a checkpoint is made of."""

    def __init__(self, launch: RankLaunch, layout: Layout, reporter: Reporter, before: Hook = unhindered) -> None:
        self._launch, self._layout, self._reporter = launch, layout, reporter
        self._run = RunFolder(launch.run_folder, before)
        self._shared = self._run.local is not None
        # The one of these ranks that makes and removes folders: of all on a shared run folder, of its node otherwise.
        self._first = launch.rank == 0 if self._shared else launch.local_rank == 0
        self._saved_at = time.monotonic()
        self._uploads = None
        if not self._shared:
            if self._first:  # what an attempt left that was killed
                shutil.rmtree(self._staging, ignore_errors=True)
            store = dist.distributed_c10d._get_default_store()
            self._uploads = Uploads(self._run, launch.rank, layout.world, store, self._told, self._upload_failed)

    def save(self, engine: Engine, step: int, reports: Sequence[StepReport]) -> bool:
        """Write a checkpoint of `step`, with the reports since the one before; it exists once its manifest does.

        False where a disk refuses it, as when it is full: training can go on. InputError once no checkpoint could be
        kept for longer than `policy.unsaved_minutes`.
        """
        began = time.monotonic()
        folder = self._folder(step)
        written, problem = [], self._prepare(folder, step)
        if not any(self._everywhere(problem)):
            written, problem = self._write(engine, folder)
        parts = self._everywhere((written, problem))
        problem = next((problem for _, problem in parts if problem), None)
        manifest = None
        if problem is None and self._launch.rank == 0:
            files = tuple(sorted((entry for part, _ in parts for entry in part), key=lambda entry: entry.name))
            manifest = self._manifest(step, files, tuple(reports))
            if self._shared:
                self._check_shared(folder, files)
                problem = self._commit(manifest, time.monotonic() - began)
        if problem is None and self._uploads:
            self._uploads.stage(Staged(step, folder, written, manifest))
            if manifest:
                self._reporter.event(
                    "checkpoint_staged",
                    f"checkpoint at step {step} is on its way to the store",
                    step=step,
                    size_bytes=manifest.size_bytes,
                    seconds=time.monotonic() - began,
                )
        if problem is not None and self._first:
            shutil.rmtree(folder, ignore_errors=True)
        if problem is not None and self._launch.rank == 0:
            text = f"no checkpoint at step {step}, training goes on: {problem}"
            self._reporter.event("checkpoint_failed", text, step=step, problem=problem)
        self._check_overdue(problem)
        return problem is None

    def close(self) -> None:
        """Wait for the last upload; InputError where it could not be made, with the remedy."""
        if not self._uploads:
            return
        self._uploads.close(self._launch.job.policy.grace_seconds)
        if self._uploads.problem:
            self._give_up(self._uploads.problem)

    def restore(self, engine: Engine) -> int:
        """Load the first of the offered checkpoints that is whole. Returns its step, 0 where none is offered."""
        for step in self._launch.checkpoint_steps:
            if self._load(engine, step):
                return step
        if self._launch.checkpoint_steps:
            raise InputError(
                "checkpoint",
                ", ".join(map(str, self._launch.checkpoint_steps)),
                "none of them is whole; see the events",
            )
        return 0

    def _prepare(self, folder: Path, step: int) -> str | None:
        if not self._first:
            return None
        try:
            if self._shared:
                manifests.remove(self._run, step)  # what a crash in mid-save left, or an unverifiable one
            else:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            return _remedy(error)
        return None

    def _write(self, engine: Engine, folder: Path) -> tuple[list[FileEntry], str | None]:
        try:
            return engine.save(folder, self._run.before), None
        except OSError as error:
            return [], _remedy(error)
        except CheckpointException as error:  # torch's, of what was raised on any rank
            refusals = [failure for failure, _ in error.failures.values() if isinstance(failure, OSError)]
            if len(refusals) < len(error.failures):
                raise
            return [], _remedy(refusals[0])

    def _commit(self, manifest: CheckpointManifest, seconds: float) -> str | None:
        try:
            manifests.write(self._run, manifest)
        except OSError as error:
            return _remedy(error)
        self._saved_at = time.monotonic()
        self._told(manifest, seconds)
        return None

    def _told(self, manifest: CheckpointManifest, seconds: float = 0.0) -> None:
        """seconds: that training waited for it; an upload makes none wait."""
        where = f"in {seconds:.2f} s" if self._shared else "in the store"
        self._reporter.event(
            "checkpoint_written",
            f"checkpoint at step {manifest.step}: {manifest.size_bytes / 1e6:.1f} MB {where}",
            step=manifest.step,
            size_bytes=manifest.size_bytes,
            seconds=seconds,
        )
        try:
            manifests.prune(self._run, self._launch.job.checkpoint)
        except Exception as error:  # a filesystem's library raises what it likes; what stays too long does no harm
            self._reporter.event("prune_failed", f"older checkpoints could not be removed: {error}")

    def _upload_failed(self, step: int, problem: str) -> None:
        text = f"checkpoint at step {step} could not be uploaded, and will be tried again: {problem}"
        self._reporter.event("upload_failed", text, step=step, problem=problem)

    def _check_overdue(self, problem: str | None) -> None:
        if self._launch.rank:
            return
        limit = 60 * self._launch.job.policy.unsaved_minutes
        if problem and time.monotonic() - self._saved_at > limit:
            self._give_up(problem)
        if self._uploads and self._uploads.unsaved_seconds > limit:
            self._give_up(self._uploads.problem or "the store does not answer")

    def _give_up(self, problem: str) -> None:
        rule = f"keeps no checkpoint, and what was trained since the last would be lost: {problem}"
        remedy = f"a store that takes writes; then fivefold resume {self._run.run_id}"
        raise InputError("run root", self._run.place, rule, remedy)

    def _load(self, engine: Engine, step: int) -> bool:
        problems: list[str] = []
        manifest = None
        try:
            manifest = manifests.read(self._run, step)
            mine = manifest.files[self._launch.rank :: self._layout.world]
            problems = [text for entry in mine if (text := manifests.damage(self._run, step, entry))]
        except DamagedError as error:
            problems = [str(error)]
        found = dict.fromkeys(problem for part in self._everywhere(problems) for problem in part)
        if found or manifest is None:
            if self._launch.rank == 0:
                text = f"checkpoint at step {step} is damaged and left aside: {'; '.join(found)}"
                self._reporter.event("checkpoint_damaged", text, step=step, problems=list(found))
            return False
        folder = self._folder(step)
        if not self._shared and self._first:
            for entry in manifest.files:
                (folder / entry.name).parent.mkdir(parents=True, exist_ok=True)
                self._run.download(f"{manifests.folder_name(step)}/{entry.name}", folder / entry.name)
        dist.barrier()
        engine.load(folder)
        dist.barrier()
        if not self._shared and self._first:
            shutil.rmtree(folder)
        return True

    def _everywhere(self, mine: Any) -> list[Any]:
        gathered: list[Any] = [None] * self._layout.world
        dist.all_gather_object(gathered, mine)
        return gathered

    @property
    def _staging(self) -> Path:
        return Path(tempfile.gettempdir()) / f"fivefold-staging-{self._launch.run_id}"

    def _folder(self, step: int) -> Path:
        return (self._run.local or self._staging) / manifests.folder_name(step)

    def _check_shared(self, folder: Path, files: Sequence[FileEntry]) -> None:
        missing = [entry.name for entry in files if not (folder / entry.name).exists()]
        if missing:
            raise InputError(
                "run folder",
                self._run.place,
                f"is not on a disk that all nodes share: rank 0 does not see {', '.join(missing)}",
                "a shared folder or an object store",
            )

    def _manifest(self, step: int, files: tuple[FileEntry, ...], reports: tuple[StepReport, ...]) -> CheckpointManifest:
        launch, job = self._launch, self._launch.job
        return CheckpointManifest(
            run_id=launch.run_id,
            attempt=launch.attempt,
            step=step,
            engine=job.engine,
            layout=job.layout,
            model=job.model,
            data_cursor=step * job.train.global_batch,
            random_state={"seed": job.train.seed, "step": step},
            written_at=time.time(),
            reports=reports,
            files=files,
        )


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error}); free some of it, or lower checkpoint.keep"
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"the disk refuses writes ({error}); make it writable for this user"
    return str(error)
