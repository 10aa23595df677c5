"""Rows of a source, one sample each: windows of its stream, or packed documents."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jobs.errors import InputError
from orchestrator.worker import token_cache
from orchestrator.worker.packing import Packing, pack
from orchestrator.worker.token_cache import Source, Tokens


class Row(NamedTuple):
    """Arrays of [sequence_length], as a row of Batch has them."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    documents: np.ndarray


class Windows:
    """Windows tokens[k*length : k*length + length + 1], whatever documents they cross; neighbours share a token."""

    def __init__(self, source: Source, first: int, last: int, length: int) -> None:
        self._tokens, self._first, self._length = source.tokens, first, length
        self.count = (last - first - 1) // length

    def __getitem__(self, index: int) -> Row:
        start = self._first + index * self._length
        window = self._tokens[start : start + self._length + 1].astype(np.int64)
        return Row(window[:-1], window[1:], np.ones(self._length, np.float32), np.zeros(self._length, np.int64))


class PackedRows:
    """Rows of `pack`. What is left of one is padding: id 0, no counted label, a document of its own."""

    def __init__(self, tokens: Tokens, packing: Packing, length: int) -> None:
        self._tokens, self._packing, self._length = tokens, packing, length
        self.count = packing.rows

    def __getitem__(self, index: int) -> Row:
        row = Row(*(np.zeros(self._length, kind) for kind in (np.int64, np.int64, np.float32, np.int64)))
        pieces = slice(*self._packing.bounds[index : index + 2].tolist())
        at = 0
        for start, places in zip(
            self._packing.starts[pieces].tolist(), self._packing.lengths[pieces].tolist(), strict=True
        ):
            piece, here = self._tokens[start : start + places + 1], slice(at, at + places)
            row.tokens[here], row.labels[here], row.loss_mask[here] = piece[:-1], piece[1:], 1
            at += places
            row.documents[at:] += 1
        return row


def packed(source: Source, split: str, first: int, last: int, length: int) -> PackedRows:
    """The packed rows of a source's tokens first..last-1; where each piece goes is worked out once a node.

    Raises InputError where no document has two tokens.
    """

    def load(folder: Path) -> Packing:
        return Packing(*token_cache.load_arrays(folder, "starts", "lengths", "bounds"))

    def build(partial: Path) -> None:
        packing = pack(source.ends, first, last, length)
        if not packing.rows:
            rule = f"no document of two tokens is among the {last - first} {split} tokens of {source.name}"
            raise InputError("data.packing", True, rule, False)
        token_cache.save_arrays(partial, starts=packing.starts, lengths=packing.lengths, bounds=packing.bounds)

    folder = source.folder.with_name(f"{source.folder.name}-{split}-packed-{length}")
    return PackedRows(source.tokens, token_cache.cached(folder, load, build), length)
