from __future__ import annotations

import numpy as np
import pytest

from parallel.dispatch import dispatch_groups
from parallel.layout import Layout


def test_micro_batches_are_dispatched_apart() -> None:
    groups = dispatch_groups(Layout(dp=2, ep=2), micro_batch=2, rows=4, sequence_length=3)
    assert groups.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]]


def test_tensor_parallel_ranks_see_consecutive_parts() -> None:
    groups = dispatch_groups(Layout(tp=2), micro_batch=1, rows=2, sequence_length=4)
    assert groups.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_context_parallel_ranks_see_a_chunk_of_either_end() -> None:
    # Rank 0 holds chunks 0 and 3, rank 1 chunks 1 and 2; the ranks of tp halve what theirs hold.
    assert dispatch_groups(Layout(cp=2), 1, 1, 8).tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    assert dispatch_groups(Layout(cp=2, tp=2), 1, 1, 8).tolist() == [[0, 0, 2, 2, 3, 3, 1, 1]]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, cp=2), Layout(cp=4, dp=2), Layout(tp=4, pp=2)])
def test_ranks_see_equally_many(layout: Layout) -> None:
    _, counts = np.unique(dispatch_groups(layout, 2, 8, 32), return_counts=True)
    assert len(counts) == 4 * layout.tp * layout.cp
    assert set(counts) == {2 * 32 // (layout.tp * layout.cp)}


def test_deepspeed_leaves_a_rank_a_run_of_tokens_and_tensor_parallel_ranks_all_of_them() -> None:
    assert dispatch_groups(Layout(cp=2, tp=2), 1, 1, 8, "deepspeed").tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
