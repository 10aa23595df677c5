"""Sources to batches, in an order that is a pure function.

Sample i of a run is the same row whatever the layout, the micro-batch, the engine and the restarts on the way: the
samples consumed, step * global_batch, are the whole state of the reader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from jobs import corpus
from jobs.indexed import check_windows
from jobs.spec import DataSpec, TrainSpec
from orchestrator.worker.engines.protocol import Batch
from orchestrator.worker.indexed import open_indexed
from orchestrator.worker.order import Blend, permuted
from orchestrator.worker.rows import PackedRows, Windows, packed
from orchestrator.worker.text import open_text
from orchestrator.worker.token_cache import Source


class Data:
    """The training and the validation rows of a job, each of `sequence_length` tokens and labels."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], data: DataSpec, train: TrainSpec) -> None:
        self._train, self._packing = train, data.packing
        self._blend = Blend(weights)
        self.train_tokens = sum(source.train_tokens for source in sources)
        self.validation_tokens = sum(source.total - source.train_tokens for source in sources)
        self.unigram_entropy = _entropy([source.counts for source in sources], self._blend.shares)
        """Of the training tokens, in nats: what a model scores that knows only how often each token occurs."""
        self.fingerprint = _together([source.fingerprint for source in sources])
        """SHA-256 of all tokens: nodes, and the attempts of a run, read the same data only if theirs agree."""
        self._training = [self._rows(source, "training", 0, source.train_tokens) for source in sources]
        self._validation = []
        if train.eval_batches and data.validation_fraction:
            self._validation = [
                self._rows(source, "validation", source.train_tokens, source.total) for source in sources
            ]

    def batches(self, step: int, dp_rank: int, dp: int, micro_batch: int) -> list[Batch]:
        """One data-parallel rank's micro-batches of a step, in order; steps count from 1.

        Row i of micro-batch m is sample (m * dp + dp_rank) * micro_batch + i of the step's global batch. Raises
        ValueError where dp * micro_batch does not divide the global batch.
        """
        first = (step - 1) * self._train.global_batch
        return self._batches(self._training, str(self._train.seed), first, dp_rank, dp, micro_batch)

    def validation_batches(self, index: int, dp_rank: int, dp: int, micro_batch: int) -> list[Batch]:
        """As `batches`, for global batch `index` (from 0) of the validation split; empty where none is to be read.

        The order does not depend on the seed, so that runs are validated on the same rows.
        """
        if not self._validation:
            return []
        first = index * self._train.global_batch
        return self._batches(self._validation, "validation", first, dp_rank, dp, micro_batch)

    def _rows(self, source: Source, split: str, first: int, last: int) -> Windows | PackedRows:
        length = self._train.sequence_length
        if self._packing:
            return packed(source, split, first, last, length)
        return Windows(source, first, last, length)

    def _batches(
        self, sources: Sequence[Windows | PackedRows], order: str, first: int, dp_rank: int, dp: int, micro_batch: int
    ) -> list[Batch]:
        count, rest = divmod(self._train.global_batch, dp * micro_batch)
        if rest:
            raise ValueError(
                f"dp*micro_batch={dp}*{micro_batch} does not divide global_batch={self._train.global_batch}"
            )
        found = []
        for micro in range(count):
            start = first + (micro * dp + dp_rank) * micro_batch
            rows = []
            for sample in range(start, start + micro_batch):
                turn, nth = self._blend.at(sample)
                source = sources[turn]
                own = order if len(sources) == 1 else f"{order}/{turn}"
                rows.append(source[permuted(nth, source.count, own)])
            tokens, labels, mask, documents = map(np.stack, zip(*rows, strict=True))
            found.append(Batch(tokens, labels, mask, documents if self._packing else None))
        return found


def open_data(data: DataSpec, train: TrainSpec, vocab: int) -> Data:
    """The job's data, tokenised or looked through by the first process of a node that asks, and mapped by all.

    Raises InputError for what is missing or cannot be read, for token ids that are not below `vocab`, and for a split
    that is shorter than one window.
    """
    if data.indexed is None:
        corpus.check_vocabulary(data, vocab)
        weights, sources = [1.0], [open_text(data)]
    else:
        weights = list(data.indexed.values())
        sources = [open_indexed(prefix, data, vocab) for prefix in data.indexed]
    for source in sources:
        check_windows(data, train, source.name, source.total, source.train_tokens)
    return Data(sources, weights, data, train)


def _entropy(counts: Sequence[np.ndarray], shares: Sequence[int]) -> float:
    """Shannon's entropy, nats, of a blend of distributions that are given by counts, at shares of it."""
    blended = sum(share * np.asarray(count) / max(count.sum(), 1) for count, share in zip(counts, shares, strict=True))
    blended = blended[blended > 0] / sum(shares)
    return float(-(blended * np.log(blended)).sum())


def _together(fingerprints: Sequence[str]) -> str:
    """One fingerprint of several; one alone stays what it is."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()
