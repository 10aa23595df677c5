"""Which tokens fill an expert's places together: where tokens are dropped, what is trained depends on the layout."""

from __future__ import annotations

import numpy as np

from parallel.layout import Layout


def dispatch_groups(layout: Layout, micro_batch: int, rows: int, sequence_length: int) -> np.ndarray:
    """Number of the dispatch group of each token of a global batch, int64 [rows, sequence_length].

    A rank gives out the places of all experts among the tokens that its router sees: of one micro-batch, the part of
    the sequence that tp * cp leaves it. `rows` are in the order in which micro-batches take them, `micro_batch` at a
    time. Layouts train alike where these groups are alike: of equal micro-batch, cp, and tp with sequence parallelism.
    dp, pp, vpp, ep, etp and the dispatcher are free. For `models.reference.Decoder`.
    """
    parts = layout.cp * (layout.tp if layout.sp else 1)
    part = np.arange(sequence_length) // (sequence_length // parts)
    return (np.arange(rows) // micro_batch * parts)[:, None] + part
