"""Which layout a run goes on at when it cannot at its own."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.compose import compose
from jobs.spec import JobSpec
from orchestrator.control.replanning import relieving
from parallel.layout import Layout


def pipelined(*overrides: str) -> JobSpec:
    of_all = ("layout.dp=1", "layout.tp=1", "layout.ep=1", "layout.vpp=1", "layout.micro_batch=2")
    return compose("quickstart", ["cluster.devices_per_node=2", "layout.pp=2", *of_all, *overrides])


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(2, 5), stages=st.integers(2, 3), slow=st.integers(0, 2), slower=st.floats(0.05, 4))
def test_a_slow_stage_is_given_the_layers_that_make_the_longest_shortest(
    layers: int, stages: int, slow: int, slower: float
) -> None:
    layers, slow = layers * stages, slow % stages
    many = f"layout.pp={stages}", f"model.layers={layers}", f"cluster.devices_per_node={stages}"
    cost = [1 + slower * (stage == slow) for stage in range(stages)]

    def longest(each: tuple[int, ...]) -> float:
        return max(count * seconds for count, seconds in zip(each, cost, strict=True))

    found = relieving(pipelined(*many), slow, slower)
    choices = (each for each in product(range(1, layers), repeat=stages) if sum(each) == layers)
    best, even = min(map(longest, choices)), longest((layers // stages,) * stages)
    if found is None:
        assert best > even * (1 - 1 / 30)
    else:
        assert found.layout.stage_layers is not None
        assert longest(found.layout.stage_layers) == best
        assert relieving(found, slow, slower) is None  # what was done is not done again


def test_without_stages_there_is_nothing_to_give_away() -> None:
    assert relieving(pipelined("layout.pp=1", "layout.dp=2"), 1, 1.0) is None
    assert relieving(pipelined("layout.vpp=2"), 1, 1.0) is None


def test_a_layout_of_unequal_stages_says_so() -> None:
    relieved = relieving(pipelined("model.layers=8"), 0, 1.0)
    assert relieved is not None
    assert Layout.of(relieved.layout).label == "pp2 (3+5 layers)"
