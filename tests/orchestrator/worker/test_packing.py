"""Packed rows: every label once an epoch, nothing across documents, and as few rows as best fit finds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.architecture import ModelArchitecture
from jobs.errors import InputError
from jobs.spec import DataSpec, TrainSpec
from models.reference import Decoder
from orchestrator.worker.data import Data, open_data
from orchestrator.worker.engines.protocol import Batch
from orchestrator.worker.packing import pack

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17), st.data())
def test_every_token_but_a_documents_first_is_a_label_once(
    documents: list[int], length: int, drawn: st.DataObject
) -> None:
    ends = np.cumsum(documents)
    total = int(ends[-1])
    first = drawn.draw(st.integers(0, total))
    last = drawn.draw(st.integers(first, total))
    packing = pack(ends, first, last, length)

    begins = {first, *(int(end) for end in ends if first <= end < last)}
    labels = [
        start + place
        for start, places in zip(packing.starts, packing.lengths, strict=True)
        for place in range(1, places + 1)
    ]
    assert sorted(labels) == [token for token in range(first, last) if token not in begins]
    for start, places in zip(packing.starts, packing.lengths, strict=True):
        assert not begins & set(range(start + 1, start + places + 1))  # all of one document

    assert packing.bounds[0] == 0
    assert packing.bounds[-1] == len(packing.starts)
    for row in (slice(*packing.bounds[row : row + 2]) for row in range(packing.rows)):
        assert 1 <= packing.lengths[row].sum() <= length
        assert (np.diff(packing.starts[row]) > 0).all()


def best_fit(lengths: list[int], room: int) -> list[int]:
    """How full each row becomes, with every piece looked at in turn; rows that are equally full are as good."""
    rows: list[list[int]] = []
    for size in sorted(lengths, reverse=True):
        fits = [row for row in rows if sum(row) + size <= room]
        if fits:
            max(fits, key=sum).append(size)
        else:
            rows.append([size])
    return sorted(map(sum, rows))


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_rows_are_those_of_best_fit_longest_first(lengths: list[int]) -> None:
    packing = pack(np.cumsum(np.array(lengths) + 1), 0, sum(lengths) + len(lengths), 20)
    assert sorted(np.add.reduceat(packing.lengths, packing.bounds[:-1]).tolist()) == best_fit(lengths, 20)


def test_a_million_documents_are_packed_with_next_to_no_padding() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 1_000_000).astype(np.int64) + 2
    packing = pack(np.cumsum(lengths), 0, int(lengths.sum()), 4096)
    assert packing.lengths.sum() == (lengths - 1).sum()
    assert packing.lengths.sum() / (packing.rows * 4096) > 0.999


def train(sequence_length: int = 8, global_batch: int = 4, **others: int) -> TrainSpec:
    fixed = {"steps": 100, "learning_rate": 1e-3, "eval_batches": 0}
    return TrainSpec(sequence_length=sequence_length, global_batch=global_batch, **{**fixed, **others})


def spec(folder: Path, **others: object) -> DataSpec:
    fixed = {"files": (f"{folder}/*.txt",), "cache": str(folder / "cache"), "packing": True, "validation_fraction": 0}
    return DataSpec(**{**fixed, **others})


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty documents, each of letters of its own: A, BB, CCC, ..."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(chr(65 + number) * (number + 1))
    return folder


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        (getattr(a, name) == getattr(b, name)).all()
        for a, b in zip(one, other, strict=True)
        for name in ("tokens", "labels", "loss_mask", "documents")
    )


def epoch(data: Data) -> Batch:
    """Every row once: of a job whose global batch is the number of its rows."""
    (whole,) = data.batches(1, 0, 1, data._training[0].count)
    return whole


def packed_epoch(texts: Path, length: int) -> Batch:
    rows = open_data(spec(texts), train(length), 257)._training[0].count
    return epoch(open_data(spec(texts), train(length, rows), 257))


@pytest.mark.parametrize("length", [8, 31, 100])
def test_rows_hold_documents_apart(texts: Path, length: int) -> None:
    batch = packed_epoch(texts, length)
    assert batch.documents is not None
    assert (batch.tokens.dtype, batch.loss_mask.dtype, batch.documents.dtype) == ("int64", "float32", "int64")
    assert (batch.documents[:, 0] == 0).all()
    assert np.isin(np.diff(batch.documents), (0, 1)).all()

    seen = Counter()
    for tokens, labels, mask, documents in zip(
        batch.tokens, batch.labels, batch.loss_mask, batch.documents, strict=True
    ):
        for document in np.unique(documents):
            here = documents == document
            if not mask[here].any():
                assert document == documents[-1]
                assert not tokens[here].any()
                continue
            assert mask[here].all()
            assert (tokens[here][1:] == labels[here][:-1]).all()
            (letter,) = set(tokens[here].tolist())
            assert set(labels[here].tolist()) <= {letter, 256}
            seen.update({letter: int(here.sum())})
    # a document of n letters and its separator has n labels: all letters but the first, and the separator
    assert seen == {65 + number: number + 1 for number in range(30)}
    assert Counter(batch.labels[batch.loss_mask == 1].tolist())[256] == 30


@settings(deadline=None, max_examples=25)
@given(
    dp=st.integers(1, 4),
    micro_batch=st.integers(1, 3),
    count=st.integers(1, 2),
    step=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_no_layout_and_no_restart_changes_a_packed_step(
    texts: Path, dp: int, micro_batch: int, count: int, step: int, seed: int
) -> None:
    batch = dp * micro_batch * count
    data, later = (open_data(spec(texts), train(16, batch, seed=seed), 257) for _ in range(2))
    whole = data.batches(step, 0, 1, 1)
    shared = [later.batches(step, rank, dp, micro_batch) for rank in range(dp)]
    joined = [
        Batch(
            *(
                getattr(shared[rank][micro], name)[row : row + 1]
                for name in ("tokens", "labels", "loss_mask", "documents")
            )
        )
        for micro in range(count)
        for rank in range(dp)
        for row in range(micro_batch)
    ]
    assert same(whole, joined)


def test_validation_is_packed_too(texts: Path) -> None:
    data = open_data(spec(texts, validation_fraction=0.3), train(16, 2, eval_batches=2), 257)
    (batch,) = data.validation_batches(1, 0, 1, 2)
    assert batch.documents is not None
    trained = {
        int(token) for step in range(1, 60) for batch in data.batches(step, 0, 1, 2) for token in batch.tokens.flat
    }
    assert not trained & set(batch.tokens[batch.loss_mask == 1].tolist())


def test_without_packing_a_row_is_one_document(texts: Path) -> None:
    (batch, *_) = open_data(spec(texts, packing=False), train(), 257).batches(1, 0, 1, 1)
    assert batch.documents is None


def test_text_of_single_tokens_cannot_be_packed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    (tmp_path / "b.txt").write_bytes(b"")
    data = open_data(spec(tmp_path), train(2, 1), 257)
    (batch,) = data.batches(1, 0, 1, 1)
    assert (batch.tokens.tolist(), batch.labels.tolist(), batch.loss_mask.tolist()) == ([[97, 0]], [[256, 0]], [[1, 0]])
    with pytest.raises(InputError, match=r"data\.packing=True: no document of two tokens is among the 1 validation"):
        open_data(spec(tmp_path, validation_fraction=0.4), train(2, 1, eval_batches=1), 257)


def test_a_packed_row_scores_as_its_documents_alone(texts: Path) -> None:
    model = ModelArchitecture(
        name="tiny",
        layers=2,
        hidden=16,
        heads=2,
        kv_heads=1,
        head_dim=8,
        ffn=32,
        vocab=257,
        experts=2,
        top_k=1,
        expert_ffn=16,
    )
    torch.manual_seed(0)
    oracle = Decoder(model).double()
    batch = packed_epoch(texts, 31)
    assert batch.documents is not None
    with torch.no_grad():
        whole = oracle(torch.from_numpy(batch.tokens), torch.from_numpy(batch.documents)).logits
        for row in range(0, len(batch.tokens), 4):
            for document in np.unique(batch.documents[row]):
                here = batch.documents[row] == document
                alone = oracle(torch.from_numpy(batch.tokens[row][here])[None]).logits[0]
                torch.testing.assert_close(whole[row][torch.from_numpy(here)], alone)
