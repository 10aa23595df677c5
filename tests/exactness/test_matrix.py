"""Thirty of the layouts that `make exact` holds against the oracle, and what the whole of them covers."""

from __future__ import annotations

import pytest
from cases import Case, subset
from matrix import Outcome


@pytest.mark.parametrize("case", subset(), ids=lambda case: case.name)
def test_a_layout_trains_as_the_oracle_does(outcome: Outcome, case: Case) -> None:
    result = outcome(case)
    assert result.exact, str(result)
