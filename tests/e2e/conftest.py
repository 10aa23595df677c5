from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import JOB, Answer, Fivefold, Opened, metrics, numbers

from orchestrator.run_folder import RunFolder

RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray's that try to tell a dead cluster of its death for half a minute when its driver was killed."""


@pytest.fixture(scope="session")
def opened() -> Iterator[Opened]:
    """Opens a `Fivefold` on folders of its own, and afterwards looks for processes that it left behind."""
    # Under /tmp itself: Ray's sockets have room for 107 characters.
    place = Path(tempfile.mkdtemp(dir="/tmp", prefix="5f-"))

    @contextmanager
    def opened(root: str | None = None, **environment: str) -> Iterator[Fivefold]:
        name = secrets.token_hex(3)
        folder = place / name
        folder.mkdir()
        of_all = {"RAY_TMPDIR": str(place), "TMPDIR": str(place), "XDG_CACHE_HOME": str(place / "cache")}
        fivefold = Fivefold(folder, f"FIVEFOLD_E2E_{name}", of_all | environment, root)
        try:
            yield fivefold
            assert fivefold.survivors(10, but=RAYS_OWN) == []
        finally:
            fivefold.end_all()

    yield opened
    shutil.rmtree(place)


@pytest.fixture
def fivefold(opened: Opened) -> Iterator[Fivefold]:
    with opened() as fivefold:
        yield fivefold


@pytest.fixture(scope="session")
def undisturbed(opened: Opened) -> Iterator[tuple[Fivefold, Answer]]:
    """One run that nothing happened to, rehearsed before its first step, and the command that reads it."""
    with opened() as fivefold:
        yield fivefold, fivefold("run", JOB, "plan_memory=true")


@pytest.fixture(scope="session")
def reference(undisturbed: tuple[Fivefold, Answer]) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step of the undisturbed run."""
    return {line["step"]: numbers(line) for line in metrics(RunFolder(undisturbed[1].document["run_folder"]))}
