"""Megatron's token files, as its own builder writes them, and what is said of those that cannot be used."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from jobs import corpus, indexed
from jobs.errors import CombinedInputError, InputError
from jobs.spec import DataSpec, TrainSpec

TRAIN = TrainSpec(steps=1, sequence_length=8, global_batch=1, learning_rate=1e-3)


def write(prefix: Path, documents: list[list[list[int]]], dtype: type[np.number] = np.int32) -> str:
    """Documents of sequences of ids, as preprocess_data writes them."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for sequences in documents:
        for ids in sequences:
            builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def refusal(*prefixes: str, **others: object) -> InputError:
    with pytest.raises(InputError) as caught:
        corpus.check(DataSpec(indexed=dict.fromkeys(prefixes, 1.0), **{"validation_fraction": 0, **others}), TRAIN)
    return caught.value


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32, np.int64])
def test_what_the_builder_writes_is_read(tmp_path: Path, dtype: type[np.number]) -> None:
    prefix = write(tmp_path / "set", [[[1, 2], [3]], [[4] * 5], [], [[]], [[7, 8, 9]]], dtype)
    found = indexed.read(prefix)
    assert found.dtype == dtype
    assert found.ends.tolist() == [3, 8, 8, 8, 11]
    corpus.check(DataSpec(indexed=prefix, validation_fraction=0), TRAIN)


def test_every_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "wiki", [[[1] * 20]])
    (tmp_path / "half.idx").write_bytes((tmp_path / "wiki.idx").read_bytes())
    refused = refusal(f"{tmp_path}/wikki", f"{tmp_path}/half")
    assert isinstance(refused, CombinedInputError)
    first, second = str(refused).splitlines()
    assert f"no {tmp_path}/wikki.bin and no {tmp_path}/wikki.idx; nearest valid: {tmp_path}/wiki" in first
    assert f"no {tmp_path}/half.bin" in second
    assert "half.idx" not in second


def test_a_path_with_its_ending_or_at_an_address_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "set", [[[1] * 20]])
    assert refusal(f"{prefix}.bin").nearest == prefix
    assert "it is a path" in str(refusal("s3://bucket/set"))


def patch(file: str, at: int, content: bytes) -> None:
    with Path(file).open("r+b") as stream:
        stream.seek(at)
        stream.write(content)


# 4 documents of one sequence, of 3, 4, 5 and 6 tokens of int32: 72 bytes of .bin, 34 + 4 * 12 + 5 * 8 = 122 of .idx.
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda prefix: os.truncate(f"{prefix}.idx", 33), r"set\.idx is truncated: it ends at byte 33, .* has 34"),
        (lambda prefix: os.truncate(f"{prefix}.idx", 121), "ends at byte 121, .*4 sequences and 5 .* asks for 122"),
        (lambda prefix: os.truncate(f"{prefix}.bin", 71), r"set\.bin is truncated: it ends at byte 71, .*18 tok.* 72"),
        (lambda prefix: os.truncate(f"{prefix}.bin", 0), "ends at byte 0"),
        (lambda prefix: os.truncate(f"{prefix}.bin", 73), "set.bin has 73 bytes, and .* tells of 72"),
        (lambda prefix: os.truncate(f"{prefix}.idx", 126), "126 bytes, and an index of 4 sequences of text has 122"),
        (lambda prefix: patch(f"{prefix}.idx", 0, b"PK"), r"begins with b'PKIDIDX.*', not b'MMIDIDX"),
        (lambda prefix: patch(f"{prefix}.idx", 9, b"\2"), "is of version 2; version 1 is read"),
        (lambda prefix: patch(f"{prefix}.idx", 17, b"\7"), "tells of float32"),
        (lambda prefix: patch(f"{prefix}.idx", 17, b"\x63"), "type code 99, which is none of 1 uint8"),
        (lambda prefix: patch(f"{prefix}.idx", 34, struct.pack("<i", 5)), "points elsewhere"),
        (lambda prefix: patch(f"{prefix}.idx", 34, struct.pack("<i", -3)), "points elsewhere"),
        (lambda prefix: patch(f"{prefix}.idx", 90, struct.pack("<q", 3)), "do not ascend from 0 to its 4"),
        (lambda prefix: patch(f"{prefix}.idx", 114, struct.pack("<q", 3)), "do not ascend from 0 to its 4"),
    ],
)
def test_harmed_files_are_refused_with_the_file_and_the_byte(
    tmp_path: Path, harm: Callable[[str], object], said: str
) -> None:
    prefix = write(tmp_path / "set", [[[1] * count] for count in (3, 4, 5, 6)])
    corpus.check(DataSpec(indexed=prefix, validation_fraction=0), TRAIN)
    harm(prefix)
    refused = refusal(prefix)
    assert refused.path == "data.indexed"
    assert refused.value == prefix
    assert re.search(said, str(refused))


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    assert "tells of no document" in str(refusal(write(tmp_path / "set", [])))


def test_each_set_of_a_blend_holds_a_window_of_each_split(tmp_path: Path) -> None:
    enough = write(tmp_path / "enough", [[[1] * 9]])
    short = write(tmp_path / "short", [[[1] * 8]])
    refused = refusal(enough, short)
    assert (refused.path, refused.nearest) == ("train.sequence_length", 7)
    assert f"a window of 9 tokens does not fit into the 8 training tokens of {short}" in str(refused)
    assert "into the 1 validation tokens" in str(refusal(write(tmp_path / "a", [[[1] * 10]]), validation_fraction=0.1))
    corpus.check(DataSpec(indexed=short, validation_fraction=0, packing=True), TRAIN)


@pytest.mark.parametrize(
    ("lengths", "fraction", "training"),
    [
        ([10] * 30, 0.1, 270),
        ([10] * 30, 0.09, 270),  # whole documents, the fewest that hold the share
        ([10] * 30, 0, 300),
        ([10] * 19, 0.1, 171),  # few: the end of the tokens
        ([1000, *[1] * 29], 0.5, 515),  # the first alone is more than the rest
    ],
)
def test_the_last_documents_are_held_out(lengths: list[int], fraction: float, training: int) -> None:
    data = DataSpec(indexed="set", validation_fraction=fraction)
    assert indexed.training_tokens(np.cumsum(lengths), data) == training
