from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: on busy cores two threads wait for one another

import pytest

from orchestrator.worker.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    return Ranks()
