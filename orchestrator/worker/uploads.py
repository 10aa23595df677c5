"""Checkpoints on their way to an object store, behind the back of training: each rank sends what it wrote.

Rank 0 decides which checkpoint goes next, always the newest that all have staged, and writes its manifest once every
rank has sent its files. Ranks talk through keys of their rendezvous' store, as collectives are the training loop's.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from orchestrator import manifests
from orchestrator.files import FileEntry
from orchestrator.manifests import CheckpointManifest
from orchestrator.run_folder import RunFolder

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 60.0


@dataclass(frozen=True)
class Staged:
    """One rank's part of a checkpoint on its node's disk."""

    step: int
    folder: Path
    files: list[FileEntry]
    manifest: CheckpointManifest | None
    """Rank 0's."""


class Uploads:
    """One upload at a time; a newer checkpoint takes the place of one that waits. Made on every rank, before training.

    store: a c10d store; every thread takes a connection of its own, as waiting blocks one. saved, failed: called on
    rank 0, from a thread.
    """

    def __init__(
        self,
        run: RunFolder,
        rank: int,
        world: int,
        store: Any,
        saved: Callable[[CheckpointManifest], None],
        failed: Callable[[int, str], None],
    ) -> None:
        self._run, self._rank, self._world, self._store = run, rank, world, store
        self._saved, self._failed = saved, failed
        self._staged: dict[int, Staged] = {}
        self._sent: set[tuple[int, str]] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._good_at = time.monotonic()
        self.problem: str | None = None
        """Rank 0's: why the last try failed, None once one succeeded."""
        self._threads = [threading.Thread(target=self._send_all, daemon=True)]
        if rank == 0:
            self._threads.append(threading.Thread(target=self._decide, daemon=True))
        for thread in self._threads:
            thread.start()

    def stage(self, staged: Staged) -> None:
        """Collective. Hand over what is on the disk; it is removed once it is of no use."""
        with self._changed:
            self._staged[staged.step] = staged
            self._changed.notify_all()

    @property
    def unsaved_seconds(self) -> float:
        """Rank 0's: for how long no checkpoint has reached the store while one waits to."""
        with self._changed:
            return time.monotonic() - self._good_at if self._staged else 0.0

    def close(self, patience_seconds: float) -> None:
        """Collective. Wait until the last checkpoint is in the store; rank 0's `problem` tells if not in time."""
        store = self._store.clone()
        if self._rank == 0:
            with self._changed:
                if not self._changed.wait_for(lambda: not self._staged, timeout=patience_seconds):
                    self.problem = self.problem or f"the store has not answered for {patience_seconds:.0f} s"
                self._closing = True
                self._changed.notify_all()
            store.set("uploads/closed", "")
            # The store goes with this rank: an answer that is still on its way would be lost.
            for rank in range(1, self._world):
                _wait_for(store, f"uploads/closed/{rank}")
        else:
            _wait_for(store, "uploads/closed")
            with contextlib.suppress(RuntimeError):
                store.set(f"uploads/closed/{self._rank}", "")
            with self._changed:
                self._forget(max(self._staged, default=0))

    def _decide(self) -> None:
        store, pause, turn = self._store.clone(), _FIRST_PAUSE_SECONDS, 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._staged or self._closing)
                if self._closing:
                    return
                newest = self._staged[max(self._staged)]
            turn += 1
            problem = self._upload(store, turn, newest)
            if problem is None:
                pause = _FIRST_PAUSE_SECONDS
                continue
            self.problem = problem
            self._failed(newest.step, problem)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, timeout=pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _upload(self, store: Any, turn: int, newest: Staged) -> str | None:
        assert newest.manifest is not None
        try:
            if self._run.exists(f"{manifests.folder_name(newest.step)}/manifest.json"):
                manifests.remove(self._run, newest.step)  # one that was found damaged
        except Exception as error:  # a filesystem's library raises what it likes
            return f"{type(error).__name__}: {error}"
        store.set(f"uploads/{turn}", str(newest.step))
        keys = [f"uploads/{turn}/{rank}" for rank in range(self._world)]
        for key in keys:
            _wait_for(store, key)
        problems = [text for key in keys if (text := store.get(key).decode())]
        if problems:
            return problems[0]
        try:
            manifests.write(self._run, newest.manifest)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        self._saved(newest.manifest)
        with self._changed:
            self._good_at, self.problem = time.monotonic(), None
            self._forget(newest.step)
            self._changed.notify_all()
        return None

    def _send_all(self) -> None:
        store, turn = self._store.clone(), 0
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it rank 0
            while True:
                turn += 1
                _wait_for(store, f"uploads/{turn}")
                step = int(store.get(f"uploads/{turn}"))
                with self._changed:
                    self._changed.wait_for(lambda step=step: step in self._staged)
                    if self._rank:
                        self._forget(step - 1)
                    staged = self._staged[step]
                store.set(f"uploads/{turn}/{self._rank}", self._send(staged) or "")

    def _send(self, staged: Staged) -> str | None:
        try:
            for file in staged.files:
                if (staged.step, file.name) not in self._sent:
                    self._run.upload(staged.folder / file.name, f"{manifests.folder_name(staged.step)}/{file.name}")
                    self._sent.add((staged.step, file.name))
        except Exception as error:  # a filesystem's library raises what it likes
            return f"{type(error).__name__}: {error}"
        return None

    def _forget(self, newest: int) -> None:
        for step in [step for step in self._staged if step <= newest]:
            staged = self._staged.pop(step)
            for file in staged.files:
                (staged.folder / file.name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other ranks of the node may have files there
                staged.folder.rmdir()


def _wait_for(store: Any, key: str) -> None:
    while True:
        try:
            store.wait([key], timedelta(seconds=60))
            return
        except RuntimeError as error:
            if "imeout" not in str(error) and "imed out" not in str(error):
                raise
