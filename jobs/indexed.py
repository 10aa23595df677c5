"""Megatron's indexed token files, read and checked without Megatron: `PREFIX.bin` and `PREFIX.idx`.

The .bin is token ids and nothing else. The .idx, little-endian, as megatron.core.datasets.indexed_dataset writes it:
9 bytes of magic, a version, a type code, the numbers of sequences and of document bounds, then a length (int32, tokens)
and a pointer (int64, byte of the .bin) a sequence, and the first sequence of each document (int64) with one more for
the end. A document is one sequence, or several where sentences were split.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.errors import CombinedInputError, InputError, closest
from jobs.spec import DataSpec, TrainSpec

FEWEST_DOCUMENTS = 20
"""Below this many documents the validation split is the end of the tokens, not a choice of documents."""

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_TYPES_OF_NO_TOKENS = {6: "float64", 7: "float32"}


@dataclass(frozen=True)
class IndexedTokens:
    """What an index says of its .bin, where the two agree."""

    prefix: str
    dtype: np.dtype[np.generic]
    ends: np.ndarray
    """int64 [documents]: tokens of the .bin up to and with each document."""


def check(data: DataSpec, train: TrainSpec) -> None:
    """Raise InputError unless every prefix of `data.indexed` has a sound .bin and .idx, long enough to train on.

    Costs a pass over each .idx; of a .bin only its size is looked at.
    """
    errors = []
    for prefix in data.indexed or {}:
        try:
            found = read(prefix)
            check_windows(data, train, prefix, int(found.ends[-1]), training_tokens(found.ends, data))
        except InputError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else CombinedInputError(errors)


def training_tokens(ends: np.ndarray, data: DataSpec) -> int:
    """Tokens before the validation split, which is the last documents of a file; part of one where there are few."""
    total = int(ends[-1])
    cut = total - round(total * data.validation_fraction)
    whole = int(np.searchsorted(ends, cut, side="right"))
    return cut if len(ends) < FEWEST_DOCUMENTS or whole == 0 else int(ends[whole - 1])


def check_windows(data: DataSpec, train: TrainSpec, source: str, tokens: int, training: int) -> None:
    """Raise InputError unless a window of the sequence length, and a token more, fits into each split that is read.

    Where documents are packed, a row need not be full.
    """
    if data.packing:
        return
    needed = train.sequence_length + 1
    splits = {"training": training}
    if data.validation_fraction and train.eval_batches:
        splits["validation"] = tokens - training
    for split, count in splits.items():
        if count < needed:
            rule = f"a window of {needed} tokens does not fit into the {count} {split} tokens of {source}"
            raise InputError("train.sequence_length", train.sequence_length, rule, count - 1 if count > 2 else None)


def read(prefix: str) -> IndexedTokens:
    """Read and check an index, and that its .bin is as long as it says.

    Raises InputError for files that are missing, truncated (with the byte), or of another format.
    """
    binary, idx = files(prefix)
    try:
        size, whole = binary.stat().st_size, idx.stat().st_size
        with idx.open("rb") as stream:
            header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise _truncated(prefix, idx, whole, _HEADER.size, "its header alone has")
        magic, version, code, sequences, bounds = _HEADER.unpack(header)
        dtype = _dtype(prefix, idx, magic, version, code)
        expected = _HEADER.size + 12 * sequences + 8 * bounds
        if whole < expected:
            says = f"its header, of {sequences} sequences and {bounds} document bounds, asks for"
            raise _truncated(prefix, idx, whole, expected, says)
        if whole > expected:  # one more byte a sequence would be its mode: text or image
            rule = f"{idx} has {whole} bytes, and an index of {sequences} sequences of text has {expected}"
            raise InputError("data.indexed", prefix, rule)
        if not sequences or bounds < 2:
            raise InputError("data.indexed", prefix, f"{idx} tells of no document")
        content = np.memmap(idx, np.uint8, "r")
        lengths, pointers, firsts = (
            np.frombuffer(content, kind, count, offset)
            for kind, count, offset in (
                ("<i4", sequences, _HEADER.size),
                ("<i8", sequences, _HEADER.size + 4 * sequences),
                ("<i8", bounds, _HEADER.size + 12 * sequences),
            )
        )
    except OSError as error:
        raise InputError("data.indexed", prefix, f"cannot be read: {error}") from error
    ends = np.cumsum(lengths, dtype=np.int64)
    if lengths.min() < 0 or (pointers != (ends - lengths) * dtype.itemsize).any():
        raise InputError("data.indexed", prefix, f"{idx} points elsewhere than its sequences lie, one after the other")
    if firsts[0] != 0 or firsts[-1] != sequences or (np.diff(firsts) < 0).any():
        rule = f"the document bounds of {idx} do not ascend from 0 to its {sequences} sequences"
        raise InputError("data.indexed", prefix, rule)
    described = int(ends[-1]) * dtype.itemsize
    if size < described:
        raise _truncated(prefix, binary, size, described, f"{idx} tells of {ends[-1]} tokens of {dtype},")
    if size > described:
        rule = f"{binary} has {size} bytes, and {idx} tells of {described}: they are not of one run of preprocess_data"
        raise InputError("data.indexed", prefix, rule)
    return IndexedTokens(prefix, dtype, np.concatenate([[0], ends])[firsts[1:]])


def files(prefix: str) -> tuple[Path, Path]:
    """The .bin and the .idx of a prefix; InputError unless both are there."""
    if "://" in prefix:
        raise InputError("data.indexed", prefix, "is mapped into memory: it is a path, on a disk that every node has")
    if prefix.endswith((".bin", ".idx")):
        raise InputError("data.indexed", prefix, "is the path of both files, without the ending", prefix[:-4])
    both = binary, idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [path for path in both if not path.is_file()]
    if missing:
        others = {str(path.with_suffix("")) for path in idx.parent.glob("*.idx")}
        rule = f"there is no {' and no '.join(map(str, missing))}"
        raise InputError("data.indexed", prefix, rule, closest(prefix, others - {prefix}))
    return binary, idx


def _dtype(prefix: str, idx: Path, magic: bytes, version: int, code: int) -> np.dtype[np.generic]:
    if magic != _MAGIC:
        rule = f"{idx} is no index of Megatron's: it begins with {magic!r}, not {_MAGIC!r}"
    elif version != _VERSION:
        rule = f"{idx} is of version {version}; version {_VERSION} is read"
    elif code in _TYPES_OF_NO_TOKENS:
        rule = f"{idx} tells of {_TYPES_OF_NO_TOKENS[code]} (type code {code}), and token ids are whole numbers"
    elif code not in _TYPES:
        known = ", ".join(f"{code} {name}" for code, name in _TYPES.items())
        rule = f"{idx} has the type code {code}, which is none of {known}"
    else:
        return np.dtype(_TYPES[code])
    raise InputError("data.indexed", prefix, rule)


def _truncated(prefix: str, file: Path, size: int, expected: int, says: str) -> InputError:
    return InputError("data.indexed", prefix, f"{file} is truncated: it ends at byte {size}, and {says} {expected}")
