from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest


@pytest.fixture(params=["disk", "object store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty run root on a disk, and one at a URL of a filesystem that is not the local one."""
    if request.param == "disk":
        yield str(tmp_path / "runs")
        return
    place = f"/runs-{secrets.token_hex(4)}"
    yield f"memory:/{place}"
    memory = fsspec.filesystem("memory")
    if memory.exists(place):
        memory.rm(place, recursive=True)
