"""Layouts at which an engine, as it comes, trains another model and says nothing."""

from __future__ import annotations

from typing import Any

import pytest
from cases import Case, case
from matrix import Outcome


def at(variant: str, **degrees: int) -> Case:
    mesh: dict[str, Any] = dict.fromkeys(("tp", "cp", "dp", "pp", "vpp", "ep", "etp"), 1) | degrees
    return case("megatron", variant, mesh, 2, {})


def test_experts_replicated_over_tensor_parallel_ranks(outcome: Outcome) -> None:
    """Megatron-Core 0.16.1 reduces their gradients over the dense layers' data parallel ranks, which are too few."""
    result = outcome(at("mixtral", tp=2))
    assert result.exact, str(result)


@pytest.mark.parametrize("variant", ["llama", "mixtral"])
def test_two_pipeline_stages_with_virtual_ones(outcome: Outcome, variant: str) -> None:
    """The previous and the next rank are one process, and gloo matches messages by order: activations met gradients."""
    result = outcome(at(variant, pp=2, vpp=2))
    assert result.exact, str(result)
