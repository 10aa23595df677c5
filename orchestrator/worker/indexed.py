"""Megatron's indexed token files to sources of tokens: read where they lie, looked through once a node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jobs import indexed
from jobs.errors import InputError
from jobs.spec import DataSpec
from orchestrator.worker import token_cache
from orchestrator.worker.token_cache import PIECE, Source


class _Tokens:
    """All sequences of an IndexedDataset as one stream."""

    def __init__(self, prefix: str) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self._file = IndexedDataset(prefix)

    def __getitem__(self, span: slice) -> np.ndarray:
        dtype = np.dtype(self._file.index.dtype)
        found = self._file.bin_reader.read(dtype, span.stop - span.start, span.start * dtype.itemsize)
        return np.array(found)  # what the reader gives is unmapped with it


def open_indexed(prefix: str, data: DataSpec, vocab: int) -> Source:
    """The tokens of PREFIX.bin. Raises InputError for files that are not sound, and for ids that the model has not."""
    files = [(file.resolve(), file.stat()) for file in indexed.files(prefix)]
    state = [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in files]
    folder = token_cache.root(data) / token_cache.digest("indexed", state, data.validation_fraction, vocab)
    return token_cache.cached(
        folder,
        lambda folder: token_cache.read_facts(folder, prefix, lambda _: _Tokens(prefix)),
        lambda partial: _build(partial, prefix, data, vocab),
    )


def _build(folder: Path, prefix: str, data: DataSpec, vocab: int) -> None:
    found = indexed.read(prefix)
    train_tokens = indexed.training_tokens(found.ends, data)
    token_cache.write_facts(folder, _checked(prefix, found.ends, vocab), train_tokens, found.ends, vocab)


def _checked(prefix: str, ends: np.ndarray, vocab: int) -> Iterator[np.ndarray]:
    """The tokens a piece at a time; InputError at the first id that is not one of 0..vocab-1."""
    tokens, total = _Tokens(prefix), int(ends[-1])
    for start in range(0, total, PIECE):
        piece = tokens[start : min(start + PIECE, total)]
        wrong = np.flatnonzero((piece < 0) | (piece >= vocab))
        if len(wrong):
            at, token = start + int(wrong[0]), int(piece[wrong[0]])
            document = int(np.searchsorted(ends, at, side="right"))
            rule = f"token {at} of {prefix}.bin, in document {document}, is {token}"
            if token < 0:
                raise InputError("data.indexed", prefix, f"{rule}, and ids count from 0")
            raise InputError("model.vocab", vocab, f"{rule}, and the model has ids up to {vocab - 1}", token + 1)
        yield piece
