"""The order of samples: a permutation an epoch, a blend that keeps its weights at every moment, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.worker.order import LONGEST_PERIOD, Blend, permuted


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.integers(0, 9), st.text(max_size=12))
def test_the_order_is_a_permutation(windows: int, epoch: int, order: str) -> None:
    found = [permuted(epoch * windows + at, windows, order) for at in range(windows)]
    assert sorted(found) == list(range(windows))


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    orders = [[permuted(sample, 10, "1234") for sample in range(start, start + 10)] for start in (0, 10)]
    assert orders == [[2, 8, 7, 0, 3, 9, 6, 4, 1, 5], [1, 6, 8, 2, 7, 0, 5, 9, 3, 4]]


def test_neighbours_in_the_text_are_no_neighbours_in_the_order() -> None:
    found = np.array([permuted(sample, 5000, "1234") for sample in range(5000)])
    assert abs(np.corrcoef(np.arange(5000), found)[0, 1]) < 0.05
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    assert (np.abs(np.diff(found)) == 1).mean() < 0.002


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_every_prefix_of_a_blend_has_its_shares_to_within_one(weights: list[int]) -> None:
    blend = Blend(weights)
    given, whole = np.zeros(len(weights)), sum(weights)
    for sample in range(2 * whole + 3):
        source, nth = blend.at(sample)
        assert nth == given[source]  # each source gives its samples in order, none twice and none left out
        given[source] += 1
        assert (abs(given * whole - np.array(weights) * (sample + 1)) < whole).all()


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.3], [7, 3]),
        ([5.0], [1]),
        ([0.1, 0.2, 0.3], [1, 2, 3]),
        ([1e9, 5e8], [2, 1]),
        ([1, 1e-9], [LONGEST_PERIOD, 1]),
        ([0.123456789, 0.876543211], [8091, 57445]),
    ],
)
def test_weights_are_held_exactly_or_to_a_sample_in_65536(weights: list[float], shares: list[int]) -> None:
    assert Blend(weights).shares == shares


def test_a_blend_is_far_along_the_run_at_once_and_the_same_in_every_version() -> None:
    blend = Blend([0.5, 0.2, 0.3])
    assert [blend.at(sample)[0] for sample in range(10)] == [0, 2, 0, 1, 0, 2, 0, 1, 0, 2]
    assert blend.at(10**15 + 3) == (1, 2 * 10**14)
