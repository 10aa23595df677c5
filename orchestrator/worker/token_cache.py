"""What a node keeps of its data: built once, by the first process that asks, and mapped by all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from jobs.errors import InputError
from jobs.spec import DataSpec

PIECE = 1 << 24
"""Bytes, characters or tokens that are worked on at once, so that memory does not grow with a file."""

MOST_PIECES = 128
"""Pieces, evenly spread, that are looked at to describe a source: some two thousand million tokens, in a minute."""

FORMAT = 2
"""Of the cache's files; part of every digest, so that a new one never reads an old one's."""

T = TypeVar("T")


class Tokens(Protocol):
    """Token ids in a file. A slice of them is an array."""

    def __getitem__(self, span: slice) -> np.ndarray: ...


@dataclass(frozen=True)
class Source:
    """One stream of tokens: first those for training, then those for validation."""

    name: str
    """For messages."""
    tokens: Tokens
    train_tokens: int
    ends: np.ndarray
    """int64 [documents]: tokens up to and with each document."""
    counts: np.ndarray
    """int64 [token ids]: how often each occurs in training, among the tokens that were looked at."""
    fingerprint: str
    """SHA-256 of the tokens that were looked at: of all but for a very large source."""
    folder: Path
    """Of the cache, with these facts; what is derived from them is kept beside it."""

    @property
    def total(self) -> int:
        """All tokens, training and validation."""
        return int(self.ends[-1])


def root(data: DataSpec) -> Path:
    if data.cache is not None:
        return Path(data.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fivefold" / "tokens"


def digest(*content: object) -> str:
    """Names a cache by all that its content depends on, so far as it can be known without reading the data."""
    return hashlib.sha256(json.dumps([FORMAT, *content]).encode()).hexdigest()[:32]


def cached(folder: Path, load: Callable[[Path], T], build: Callable[[Path], None]) -> T:
    """What `load` makes of the cache in `folder`, which is built under a lock if it is not there whole.

    `build` fills a folder that is renamed when it is done. `load` raises for a folder that is not what was written:
    OSError, ValueError, TypeError or LookupError.
    """
    partial = folder.with_suffix(".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the kernel when its holder dies, however it dies
            try:
                return load(folder)
            except (OSError, ValueError, TypeError, LookupError):
                pass
            for left_over in (partial, folder):
                shutil.rmtree(left_over, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return load(folder)
    except OSError as error:
        raise InputError("data.cache", folder.parent, f"the token cache cannot be written: {error}") from error


def write_facts(folder: Path, tokens: Tokens, train_tokens: int, ends: np.ndarray, vocabulary: int) -> None:
    """Keep what a Source tells of its tokens, whose ids are 0..vocabulary-1."""
    starts = range(0, int(ends[-1]), PIECE)
    fingerprint, counts = hashlib.sha256(), np.zeros(vocabulary, np.int64)
    for start in starts[:: max(1, -(-len(starts) // MOST_PIECES))]:
        piece = tokens[start : min(start + PIECE, int(ends[-1]))]
        fingerprint.update(piece.tobytes())
        counts += np.bincount(piece[: max(train_tokens - start, 0)], minlength=vocabulary)
    save_arrays(folder, ends=ends.astype(np.int64), counts=counts)
    index = {"train_tokens": train_tokens, "fingerprint": fingerprint.hexdigest()}
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def read_facts(folder: Path, name: str, map_tokens: Callable[[np.ndarray], Tokens]) -> Source:
    """The Source whose facts are in `folder`; `map_tokens` gives the tokens of documents that end at such places."""
    index = json.loads((folder / "index.json").read_text())
    ends, counts = load_arrays(folder, "ends", "counts")
    return Source(name, map_tokens(ends), index["train_tokens"], ends, counts, index["fingerprint"], folder)


def save_arrays(folder: Path, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def load_arrays(folder: Path, *names: str) -> list[np.ndarray]:
    """Mapped and not read, so that the ranks of a node share their memory."""
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
