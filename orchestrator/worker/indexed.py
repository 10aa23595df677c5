"""Megatron's indexed token files to sources of tokens: read where they lie, looked through once a node."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jobs import indexed
from jobs.errors import InputError
from jobs.spec import DataSpec
from orchestrator.worker import token_cache
from orchestrator.worker.token_cache import Source


class _Tokens:
    """All sequences of an IndexedDataset as one stream, in which no id is read that the model has not."""

    def __init__(self, prefix: str, ends: np.ndarray, vocab: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self._file = IndexedDataset(prefix)
        self._prefix, self._ends, self._vocab = prefix, ends, vocab

    def __getitem__(self, span: slice) -> np.ndarray:
        dtype = np.dtype(self._file.index.dtype)
        mapped = self._file.bin_reader.read(dtype, span.stop - span.start, span.start * dtype.itemsize)
        wrong = np.flatnonzero((mapped < 0) | (mapped >= self._vocab))
        if len(wrong):
            raise self._refusal(span.start + int(wrong[0]), int(mapped[wrong[0]]))
        return np.array(mapped)  # a copy, for the reader unmaps what it gave when it goes

    def _refusal(self, at: int, token: int) -> InputError:
        document = int(np.searchsorted(self._ends, at, side="right"))
        rule = f"token {at} of {self._prefix}.bin, in document {document}, is {token}"
        if token < 0:
            return InputError("data.indexed", self._prefix, f"{rule}, and ids count from 0")
        return InputError(
            "model.vocab", self._vocab, f"{rule}, and the model has ids up to {self._vocab - 1}", token + 1
        )


def open_indexed(prefix: str, data: DataSpec, vocab: int) -> Source:
    """The tokens of PREFIX.bin.

    Raises InputError for files that are not sound, and for ids that the model has not: here among the tokens that are
    looked at to describe the source, which is all but for a very large one, and then as they are read.
    """
    files = [(file.resolve(), file.stat()) for file in indexed.files(prefix)]
    state = [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in files]
    folder = token_cache.root(data) / token_cache.digest("indexed", state, data.validation_fraction, vocab)

    def build(partial: Path) -> None:
        ends = indexed.read(prefix).ends
        tokens = _Tokens(prefix, ends, vocab)
        token_cache.write_facts(partial, tokens, indexed.training_tokens(ends, data), ends, vocab)

    return token_cache.cached(
        folder, lambda whole: token_cache.read_facts(whole, prefix, lambda ends: _Tokens(prefix, ends, vocab)), build
    )
