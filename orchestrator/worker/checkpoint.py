"""Saving and restoring one run's checkpoints from its ranks. Collective: every rank calls, in the same order.

The engine writes files on a disk; every rank hashes its share of them; rank 0 writes the manifest last. On an object
store each node stages its files on its own disk, and uploads or downloads them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from jobs.errors import InputError
from orchestrator import manifests
from orchestrator.manifests import CheckpointManifest, FileEntry
from orchestrator.messages import RankLaunch, StepReport
from orchestrator.run_folder import RunFolder
from orchestrator.worker.engines.protocol import Engine
from orchestrator.worker.reporter import Reporter
from parallel.layout import Layout


class Checkpoints:
    def __init__(self, launch: RankLaunch, layout: Layout, reporter: Reporter) -> None:
        self._launch, self._layout, self._reporter = launch, layout, reporter
        self._run = RunFolder(launch.run_folder)
        self._shared = self._run.local is not None
        job = launch.job
        # Ranks whose disk this rank shares the work of: all of them on a shared run folder, its node's otherwise.
        per_node = job.cluster.devices_per_node
        first = 0 if self._shared else launch.rank - launch.local_rank
        count = layout.world if self._shared else min(per_node, layout.world - first)
        self._share = (launch.rank - first, count)

    def save(self, engine: Engine, step: int, reports: Sequence[StepReport]) -> None:
        """Write a checkpoint of `step`, with the reports since the one before; it exists once its manifest does."""
        began = time.monotonic()
        folder = self._folder(step)
        if self._share[0] == 0:
            shutil.rmtree(folder, ignore_errors=True)  # what a crash in mid-save left, or an unverifiable one
            folder.mkdir(parents=True)
        dist.barrier()
        engine.save(folder)
        dist.barrier()
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        mine = [self._entry(folder, step, name) for name in names[self._share[0] :: self._share[1]]]
        gathered: list[list[FileEntry] | None] = [None] * self._layout.world
        dist.all_gather_object(gathered, mine)
        if self._launch.rank == 0:
            files = sorted((entry for part in gathered if part for entry in part), key=lambda entry: entry.name)
            manifest = self._manifest(step, tuple(files), tuple(reports))
            if self._shared:
                self._check_shared(folder, files)
            name = f"{manifests.folder_name(step)}/manifest.json"
            self._run.write(name, manifest.model_dump_json(indent=1).encode())
            manifests.prune(self._run, self._launch.job.checkpoint.keep)
            seconds = time.monotonic() - began
            self._reporter.event(
                "checkpoint_written",
                f"checkpoint at step {step}: {manifest.size_bytes / 1e6:.1f} MB in {seconds:.2f} s",
                step=step,
                size_bytes=manifest.size_bytes,
                seconds=seconds,
            )
        if not self._shared:
            dist.barrier()
            if self._share[0] == 0:
                shutil.rmtree(folder)

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

    def _load(self, engine: Engine, step: int) -> bool:
        manifest = manifests.read(self._run, step)
        share, count = self._launch.rank, self._layout.world
        damaged = [manifests.damage(self._run, step, entry) for entry in manifest.files[share::count]]
        gathered: list[list[str | None] | None] = [None] * count
        dist.all_gather_object(gathered, damaged)
        problems = [problem for part in gathered if part for problem in part if problem]
        if problems:
            if self._launch.rank == 0:
                text = f"checkpoint at step {step} is damaged and left aside: {'; '.join(problems)}"
                self._reporter.event("checkpoint_damaged", text, step=step, problems=problems)
            return False
        folder = self._folder(step)
        if not self._shared and self._share[0] == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for entry in manifest.files:
                self._run.download(f"{manifests.folder_name(step)}/{entry.name}", folder / entry.name)
        dist.barrier()
        engine.load(folder)
        dist.barrier()
        if not self._shared and self._share[0] == 0:
            shutil.rmtree(folder)
        return True

    def _folder(self, step: int) -> Path:
        place = self._run.local or Path(tempfile.gettempdir()) / f"fivefold-staging-{self._launch.run_id}"
        return place / manifests.folder_name(step)

    def _entry(self, folder: Path, step: int, name: str) -> FileEntry:
        path = folder / name
        with path.open("rb") as file:
            digest = manifests.digest(file)
        if not self._shared:
            self._run.upload(path, f"{manifests.folder_name(step)}/{name}")
        return FileEntry(name=name, size_bytes=path.stat().st_size, sha256=digest)

    def _check_shared(self, folder: Path, files: list[FileEntry]) -> None:
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
