from __future__ import annotations

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: on busy cores two threads wait for one another

import pytest

from orchestrator.worker.ranks import Ranks


@pytest.fixture(scope="module", autouse=True)
def what_was_there_before() -> None:
    """Is not looked through whenever a test collects garbage: after a thousand tests that takes a second each time."""
    gc.collect(1)
    gc.freeze()


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    return Ranks()
