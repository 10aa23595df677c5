"""What an exactness run trains on: random tokens, counted unevenly, the same global batch at every layout."""

from __future__ import annotations

import numpy as np

from jobs.spec import JobSpec
from orchestrator.worker.engines.protocol import Batch


def global_batch(job: JobSpec, step: int) -> Batch:
    """All sequences of a step, from (seed, step) alone.

    A first row counts three labels in ten and a last one all of them, so that a mean over rows, micro-batches or ranks
    is not the mean over labels. With `data.packing` rows hold one to four documents, cut anywhere. Documents begin with
    different tokens, which are not repeated at once: to a router such pairs would be alike, and which of them an expert
    takes a matter of rounding.
    """
    rows, length = job.train.global_batch, job.train.sequence_length
    draw = np.random.default_rng((job.train.seed, step))
    text = draw.integers(0, job.model.vocab, (rows, length + 1))
    mask = (draw.random((rows, length)) < np.linspace(0.3, 1, rows)[:, None]).astype(np.float32)
    mask[0, 0] = 1  # of however few labels, one counts
    begins = np.zeros((rows, length), np.int64)
    if job.data.packing:
        for row in begins:
            row[draw.choice(np.arange(1, length), size=draw.integers(0, 4), replace=False)] = 1
    documents = begins.cumsum(1)
    begins[:, 0] = 1
    text[:, :-1][begins == 1] = np.resize(draw.permutation(job.model.vocab), begins.sum())
    repeated = (begins == 1) & (text[:, 1:] == text[:, :-1])
    text[:, 1:][repeated] = (text[:, 1:][repeated] + 1) % job.model.vocab
    return Batch(text[:, :-1], text[:, 1:], mask, documents if job.data.packing else None)


def micro_batches(whole: Batch, dp_rank: int, dp: int, micro_batch: int) -> list[Batch]:
    """One data-parallel rank's share of a global batch, cut as the training loop's data is (worker/data.py)."""
    count = len(whole.tokens) // (dp * micro_batch)
    starts = [(micro * dp + dp_rank) * micro_batch for micro in range(count)]
    return [_rows(whole, slice(start, start + micro_batch)) for start in starts]


def _rows(batch: Batch, rows: slice) -> Batch:
    documents = None if batch.documents is None else batch.documents[rows]
    return Batch(batch.tokens[rows], batch.labels[rows], batch.loss_mask[rows], documents)
