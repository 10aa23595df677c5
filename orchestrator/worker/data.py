"""Text to batches: tokenised once a node into a memory-mapped cache, read in an order that is a pure function.

Sample i of a run is the same window of text whatever the layout, the micro-batch and the restarts on the way:
the samples consumed, step * global_batch, are the whole state of the reader.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from jobs import corpus
from jobs.corpus import TextFile
from jobs.errors import InputError
from jobs.spec import DataSpec, TrainSpec
from orchestrator.worker.engines.protocol import Batch

FEWEST_DOCUMENTS = 20
"""Below this many documents the validation split is the end of the text, not a choice of documents."""

Tokenize = Callable[[IO[bytes]], Iterator[np.ndarray]]
"""From a document's stream to its token ids, a piece at a time, so that memory does not grow with the document."""

_FORMAT = 1  # of the cache's files; part of the digest, so that a new one never reads an old one's
_PIECE = 1 << 24  # bytes or characters tokenised at once
_END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")


@dataclass(frozen=True)
class _Index:
    """What is known of a cache's tokens; written beside them, and last."""

    tokens: int
    train_tokens: int
    dtype: str
    unigram_entropy: float
    fingerprint: str


class Data:
    """The training and the validation tokens of a job, cut into windows of `sequence_length` + 1."""

    def __init__(self, tokens: np.ndarray, index: _Index, train: TrainSpec) -> None:
        self._train, self._length = train, train.sequence_length
        self._training, self._validation = tokens[: index.train_tokens], tokens[index.train_tokens :]
        self.train_tokens, self.validation_tokens = len(self._training), len(self._validation)
        self.unigram_entropy = index.unigram_entropy
        """Of the training tokens, in nats: what a model scores that knows only how often each token occurs."""
        self.fingerprint = index.fingerprint
        """SHA-256 of all tokens: nodes, and the attempts of a run, read the same text only if theirs agree."""

    def batches(self, step: int, dp_rank: int, dp: int, micro_batch: int) -> list[Batch]:
        """One data-parallel rank's micro-batches of a step, in order; steps count from 1.

        Row i of micro-batch m is sample (m * dp + dp_rank) * micro_batch + i of the step's global batch. Raises
        ValueError where dp * micro_batch does not divide the global batch.
        """
        first = (step - 1) * self._train.global_batch
        return self._batches(self._training, str(self._train.seed), first, dp_rank, dp, micro_batch)

    def validation_batches(self, index: int, dp_rank: int, dp: int, micro_batch: int) -> list[Batch]:
        """As `batches`, for global batch `index` (from 0) of the validation split; empty where there is no split.

        The order does not depend on the seed, so that runs are validated on the same text.
        """
        if not self.validation_tokens:
            return []
        first = index * self._train.global_batch
        return self._batches(self._validation, "validation", first, dp_rank, dp, micro_batch)

    def _batches(
        self, tokens: np.ndarray, order: str, first: int, dp_rank: int, dp: int, micro_batch: int
    ) -> list[Batch]:
        count, rest = divmod(self._train.global_batch, dp * micro_batch)
        if rest:
            raise ValueError(
                f"dp*micro_batch={dp}*{micro_batch} does not divide global_batch={self._train.global_batch}"
            )
        length, windows = self._length, _windows(len(tokens), self._length)
        found = []
        for micro in range(count):
            start = first + (micro * dp + dp_rank) * micro_batch
            at = [window_of(sample, windows, order) * length for sample in range(start, start + micro_batch)]
            rows = np.stack([tokens[offset : offset + length + 1] for offset in at]).astype(np.int64)
            found.append(Batch(rows[:, :-1], rows[:, 1:], np.ones((micro_batch, length), np.float32)))
        return found


def open_data(data: DataSpec, train: TrainSpec, vocab: int) -> Data:
    """The job's text, tokenised by the first process of a node that asks for it and mapped by all.

    Raises InputError for text that is missing or unreadable, for a tokenizer that needs more than `vocab` ids, and for
    a split that is shorter than one window.
    """
    corpus.check_vocabulary(data, vocab)
    files = corpus.resolve(data)
    folder = _cache_root(data) / _digest(data, files)
    index = _cached(folder, data, files)
    needed = train.sequence_length + 1
    splits = {"training": index.train_tokens}
    if data.validation_fraction and train.eval_batches:
        splits["validation"] = index.tokens - index.train_tokens
    for split, count in splits.items():
        if count < needed:
            rule = f"a window of {needed} tokens does not fit into the {count} {split} tokens of {len(files)} files"
            raise InputError("train.sequence_length", train.sequence_length, rule, count - 1 if count > 2 else None)
    return Data(np.memmap(folder / "tokens.bin", np.dtype(index.dtype), "r", shape=(index.tokens,)), index, train)


def window_of(sample: int, windows: int, order: str) -> int:
    """The window (0..windows-1) that a run's sample reads: each once an epoch, in an order drawn from (order, epoch).

    A keyed permutation in constant memory: a four-round Feistel network (Luby and Rackoff 1988) over the next even
    power of two, walked until it falls inside (Black and Rogaway 2002). It leans on no library's random numbers,
    so that a run resumed under another version of numpy reads the same text.
    """
    epoch, at = divmod(sample, windows)
    key = hashlib.blake2b(f"{order}/{epoch}".encode(), digest_size=32).digest()
    bits = max(1, ((windows - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = at >> bits, at & mask
        for turn in range(4):
            mixed = hashlib.blake2b(b"%d %d" % (turn, right), digest_size=8, key=key).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
        at = left << bits | right
        if at < windows:
            return at


def _windows(tokens: int, length: int) -> int:
    """Windows k of tokens[k*length : k*length + length + 1] that fit; neighbours share one token."""
    return (tokens - 1) // length


def _cached(folder: Path, data: DataSpec, files: list[TextFile]) -> _Index:
    """The index of the cache in `folder`, which is built under a lock if it is not there whole."""
    partial = folder.with_suffix(".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the kernel when its holder dies, however it dies
            index = _read_index(folder)
            if index is None:
                for left_over in (partial, folder):
                    shutil.rmtree(left_over, ignore_errors=True)
                partial.mkdir()
                try:
                    index = _build(partial, data, files)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            return index
    except OSError as error:
        raise InputError("data.cache", folder.parent, f"the token cache cannot be written: {error}") from error


def _cache_root(data: DataSpec) -> Path:
    if data.cache is not None:
        return Path(data.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fivefold" / "tokens"


def _digest(data: DataSpec, files: list[TextFile]) -> str:
    """Names the cache by all that its content depends on, so far as it can be known without reading the text."""
    tokenizer = data.tokenizer
    if tokenizer != "bytes":
        tokenizer = hashlib.sha256(corpus.tokenizer_json(data).encode()).hexdigest()
    listed = [(file.name, file.url, file.size_bytes, file.version) for file in files]
    content = json.dumps([_FORMAT, tokenizer, data.validation_fraction, listed])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _read_index(folder: Path) -> _Index | None:
    """The index of a whole cache; None if there is none, or if it is not what was written."""
    try:
        index = _Index(**json.loads((folder / "index.json").read_text()))
        whole = (folder / "tokens.bin").stat().st_size == index.tokens * np.dtype(index.dtype).itemsize
    except (OSError, ValueError, TypeError):
        return None
    return index if whole else None


def _build(folder: Path, data: DataSpec, files: list[TextFile]) -> _Index:
    """Tokenise `files` into `folder`: training tokens first, validation tokens after them, then the index."""
    held_out = {file for file in files if _is_held_out(file, data.validation_fraction)}
    if len(files) < FEWEST_DOCUMENTS or len(held_out) == len(files):
        held_out = set()
    vocabulary = corpus.vocabulary_size(data)
    dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    with (folder / "tokens.bin").open("wb") as out:
        train_tokens = total = _write(out, data, [file for file in files if file not in held_out], dtype)
        if held_out:
            total += _write(out, data, sorted(held_out), dtype)
        else:
            train_tokens -= round(total * data.validation_fraction)
        os.fsync(out.fileno())
    fingerprint, counts = hashlib.sha256(), np.zeros(vocabulary, np.int64)
    for start in range(0, total, _PIECE):
        piece = np.fromfile(folder / "tokens.bin", dtype, min(_PIECE, total - start), offset=start * dtype.itemsize)
        fingerprint.update(piece.tobytes())
        counts += np.bincount(piece[: max(train_tokens - start, 0)], minlength=vocabulary)
    index = _Index(total, train_tokens, dtype.name, _entropy(counts), fingerprint.hexdigest())
    (folder / "index.json").write_text(json.dumps(asdict(index), indent=1) + "\n")
    return index


def _is_held_out(file: TextFile, fraction: float) -> bool:
    """Whether a document is for validation: by its name alone, so that no other file can move it."""
    drawn = int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:8], "big")
    return drawn < fraction * 2**64


def _entropy(counts: np.ndarray) -> float:
    """Shannon's entropy of a distribution given by counts, nats; 0 for no counts at all."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(shares * np.log(shares)).sum())


def _write(out: IO[bytes], data: DataSpec, files: Iterable[TextFile], dtype: np.dtype) -> int:
    """Append the tokens of `files` to `out`, each file followed by the separator if there is one; returns how many."""
    tokenize = _read_bytes if data.tokenizer == "bytes" else _tokenizer(data)
    count = 0
    for ids in _readable(files, tokenize):
        out.write(ids.astype(dtype).tobytes())
        count += len(ids)
    out.flush()
    return count


def _readable(files: Iterable[TextFile], tokenize: Tokenize) -> Iterator[np.ndarray]:
    for file in files:
        try:
            with file.open() as stream:
                yield from tokenize(stream)
        except Exception as error:  # a filesystem's library raises what it likes
            raise corpus.unreadable(file.url, error) from error


def _read_bytes(stream: IO[bytes]) -> Iterator[np.ndarray]:
    while piece := stream.read(_PIECE):
        yield np.frombuffer(piece, np.uint8)
    yield np.array([corpus.SEPARATOR])


def _tokenizer(data: DataSpec) -> Tokenize:
    """Tokenise with the `tokenizers` library; what is not UTF-8 is read as U+FFFD."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(corpus.tokenizer_json(data))
    except Exception as error:  # the library raises bare Exceptions
        raise InputError("data.tokenizer", data.tokenizer, f"is no tokenizers JSON file: {error}", "bytes") from error
    tokenizer.no_truncation()  # a file made for inference may cut its text
    tokenizer.no_padding()
    separators = [found for found in map(tokenizer.token_to_id, _END_OF_TEXT) if found is not None]

    def tokenize(stream: IO[bytes]) -> Iterator[np.ndarray]:
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")
        while piece := text.read(_PIECE):
            yield np.array(tokenizer.encode(piece, add_special_tokens=False).ids, np.int64)
        yield np.array(separators[:1], np.int64)

    return tokenize
