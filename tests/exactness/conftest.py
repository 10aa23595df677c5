from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import subset
from matrix import Matrix, Outcome

from orchestrator.worker.ranks import Ranks


@pytest.fixture(scope="session")
def outcome(ranks: Ranks, request: pytest.FixtureRequest) -> Iterator[Outcome]:
    """The result of a case. All that were collected start with the first that is asked for, and run side by side."""
    matrix = Matrix(ranks)
    collected = {item.name for item in request.session.items}
    started = matrix.start(case for case in subset() if any(f"[{case.name}]" in name for name in collected))
    yield lambda case: started[case.name].result(timeout=170)
    matrix.stop()
