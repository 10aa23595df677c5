"""Text to a source of tokens: tokenised once a node, training documents first."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from jobs import corpus
from jobs.corpus import TextFile
from jobs.errors import InputError
from jobs.indexed import FEWEST_DOCUMENTS
from jobs.spec import DataSpec
from orchestrator.worker import token_cache
from orchestrator.worker.token_cache import PIECE, Source

Tokenize = Callable[[IO[bytes]], Iterator[np.ndarray]]
"""From a document's stream to its token ids, a piece at a time, so that memory does not grow with the document."""

_END_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")


def open_text(data: DataSpec) -> Source:
    """The tokens of `data.files`. Raises InputError for text that is missing or unreadable."""
    files = corpus.resolve(data)
    tokenizer = data.tokenizer
    if tokenizer != "bytes":
        tokenizer = hashlib.sha256(corpus.tokenizer_json(data).encode()).hexdigest()
    listed = [(file.name, file.url, file.size_bytes, file.version) for file in files]
    folder = token_cache.root(data) / token_cache.digest("text", tokenizer, data.validation_fraction, listed)
    dtype = _dtype(data)

    def load(folder: Path) -> Source:
        def map_tokens(ends: np.ndarray) -> np.ndarray:
            tokens = np.memmap(folder / "tokens.bin", dtype, "r")
            if len(tokens) != ends[-1]:
                raise ValueError(f"{len(tokens)} tokens are not {ends[-1]}")
            return tokens

        return token_cache.read_facts(folder, f"{len(files)} files", map_tokens)

    return token_cache.cached(folder, load, lambda partial: _build(partial, data, files))


def _dtype(data: DataSpec) -> np.dtype:
    return np.dtype(np.uint16 if corpus.vocabulary_size(data) <= 1 << 16 else np.uint32)


def _build(folder: Path, data: DataSpec, files: list[TextFile]) -> None:
    """Tokenise `files` into `folder`: training tokens first, validation tokens after them, then what is known of all.

    Validation has whole documents, or where there are few the end of the text.
    """
    held_out = {file for file in files if _is_held_out(file, data.validation_fraction)}
    if len(files) < FEWEST_DOCUMENTS or len(held_out) == len(files):
        held_out = set()
    kept = [file for file in files if file not in held_out]
    dtype = _dtype(data)
    with (folder / "tokens.bin").open("wb") as out:
        ends = np.cumsum(_write(out, data, [*kept, *sorted(held_out)], dtype))
        os.fsync(out.fileno())
    total = int(ends[-1])
    if not total:
        raise InputError("data.tokenizer", data.tokenizer, f"makes no token of the text of {len(files)} files")
    train_tokens = int(ends[len(kept) - 1]) if held_out else total - round(total * data.validation_fraction)
    tokens = np.memmap(folder / "tokens.bin", dtype, "r")
    token_cache.write_facts(folder, tokens, train_tokens, ends, corpus.vocabulary_size(data))


def _is_held_out(file: TextFile, fraction: float) -> bool:
    """Whether a document is for validation: by its name alone, so that no other file can move it."""
    drawn = int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:8], "big")
    return drawn < fraction * 2**64


def _write(out: IO[bytes], data: DataSpec, files: Iterable[TextFile], dtype: np.dtype) -> list[int]:
    """Append the tokens of `files` to `out`, each file followed by the separator if there is one; how many of each."""
    tokenize = _read_bytes if data.tokenizer == "bytes" else _tokenizer(data)
    counts = []
    for file in files:
        counts.append(0)
        for ids in _readable(file, tokenize):
            out.write(ids.astype(dtype).tobytes())
            counts[-1] += len(ids)
    out.flush()
    return counts


def _readable(file: TextFile, tokenize: Tokenize) -> Iterator[np.ndarray]:
    try:
        with file.open() as stream:
            yield from tokenize(stream)
    except Exception as error:  # a filesystem's library raises what it likes
        raise corpus.unreadable(file.url, error) from error


def _read_bytes(stream: IO[bytes]) -> Iterator[np.ndarray]:
    while piece := stream.read(PIECE):
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
        while piece := text.read(PIECE):
            yield np.array(tokenizer.encode(piece, add_special_tokens=False).ids, np.int64)
        yield np.array(separators[:1], np.int64)

    return tokenize
