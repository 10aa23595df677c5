"""Training data from Megatron's token files, as its own builder writes them: alone, blended, packed and harmed."""

from __future__ import annotations

import math
import os
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from jobs.errors import InputError
from jobs.spec import DataSpec, TrainSpec
from orchestrator.worker import token_cache
from orchestrator.worker.data import Data, open_data
from orchestrator.worker.order import Blend, permuted

SEPARATOR = 256


def train(sequence_length: int = 16, global_batch: int = 4, **others: int) -> TrainSpec:
    fixed = {"steps": 100, "learning_rate": 1e-3, "eval_batches": 0}
    return TrainSpec(sequence_length=sequence_length, global_batch=global_batch, **{**fixed, **others})


def spec(folder: Path, weights: dict[str, float], **others: object) -> DataSpec:
    indexed = {str(folder / name): weight for name, weight in weights.items()}
    return DataSpec(**{"indexed": indexed, "cache": str(folder / "cache"), "validation_fraction": 0, **others})


def write(prefix: Path, documents: list[list[int]], dtype: type[np.number] = np.uint16) -> list[int]:
    """Write token files; returns all their tokens."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return [token for document in documents for token in document]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`json` and `email`: the modules of two packages of the standard library as bytes, each with a separator."""
    folder = tmp_path_factory.mktemp("sets")
    for package, dtype in (("json", np.uint16), ("email", np.int32)):
        modules = sorted(Path(sysconfig.get_path("stdlib"), package).glob("*.py"))
        write(folder / package, [[*module.read_bytes(), SEPARATOR] for module in modules], dtype)
    return folder


def tokens(folder: Path, name: str) -> np.ndarray:
    return np.fromfile(folder / f"{name}.bin", np.uint16 if name == "json" else np.int32).astype(np.int64)


def windows(data: Data, samples: int, global_batch: int = 4) -> list[list[int]]:
    """The first samples of a run, each as its tokens and its last label."""
    found = []
    for step in range(1, samples // global_batch + 1):
        for batch in data.batches(step, 0, 1, 1):
            assert batch.documents is None
            assert batch.loss_mask.all()
            found.append([*batch.tokens[0].tolist(), int(batch.labels[0, -1])])
    return found


def test_one_set_is_read_as_text_would_be(sets: Path) -> None:
    data = open_data(spec(sets, {"json": 1}), train(), 257)
    text = tokens(sets, "json")
    assert (data.train_tokens, data.validation_tokens) == (len(text), 0)
    count = (len(text) - 1) // 16
    starts = [permuted(sample, count, "1234") * 16 for sample in range(40)]
    assert windows(data, 40) == [text[start : start + 17].tolist() for start in starts]


def test_a_blend_takes_turns_by_weight_and_begins_small_sets_anew(sets: Path) -> None:
    text = {name: tokens(sets, name) for name in ("json", "email")}
    length, samples = 200, 1200
    data = open_data(spec(sets, {"json": 0.9, "email": 0.1}), train(length), 257)
    blend, names = Blend([0.9, 0.1]), ("json", "email")
    expected, seen = [], Counter()
    for sample in range(samples):
        turn, nth = blend.at(sample)
        count = (len(text[names[turn]]) - 1) // length
        start = permuted(nth, count, f"1234/{turn}") * length
        expected.append(text[names[turn]][start : start + length + 1].tolist())
        seen.update({names[turn]: 1})
    assert windows(data, samples) == expected
    assert seen == {"json": 1080, "email": 120}
    assert seen["json"] > 2 * (len(text["json"]) // length)  # in its third epoch


def test_no_layout_and_no_restart_changes_a_blended_step(sets: Path) -> None:
    data = spec(sets, {"json": 0.3, "email": 0.7})
    whole = [batch.tokens[0].tolist() for batch in open_data(data, train(16, 12), 257).batches(7, 0, 1, 1)]
    later = open_data(data, train(16, 12), 257)
    parts = [later.batches(7, rank, 3, 2) for rank in range(3)]
    assert whole == [parts[rank][micro].tokens[row].tolist() for micro in (0, 1) for rank in range(3) for row in (0, 1)]


def test_packed_rows_end_where_documents_end(sets: Path) -> None:
    data = open_data(spec(sets, {"json": 0.5, "email": 0.5}, packing=True), train(512, 8), 257)
    for step in range(1, 10):
        (batch,) = data.batches(step, 0, 1, 8)
        assert batch.documents is not None
        inputs = batch.tokens[batch.loss_mask == 1]
        assert SEPARATOR not in inputs  # it ends a document: a label, and nothing follows from it
        ends = batch.labels == SEPARATOR
        assert (np.diff(batch.documents)[ends[:, :-1]] == 1).all()


def test_the_end_of_each_set_is_held_out(tmp_path: Path) -> None:
    write(tmp_path / "a", [[number] * 10 for number in range(40)])
    write(tmp_path / "b", [[100 + number] * 10 for number in range(40)])
    split = spec(tmp_path, {"a": 1, "b": 3}, validation_fraction=0.2)
    data = open_data(split, train(9, 4, eval_batches=2), 257)
    assert (data.train_tokens, data.validation_tokens) == (640, 160)
    (batch,) = data.validation_batches(1, 0, 1, 4)
    assert batch.tokens.shape == (4, 9)
    held_out = {
        int(token)
        for index in range(30)
        for batch in data.validation_batches(index, 0, 1, 4)
        for token in batch.labels.flat
    }
    assert held_out == {*range(32, 40), *range(132, 140)}
    trained = {token for window in windows(data, 400) for token in window}
    assert trained == {*range(32), *range(100, 132)}


def test_the_entropy_and_the_fingerprint_are_of_the_blend(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 1, 1, 2] * 10])
    write(tmp_path / "b", [[3] * 1000])
    shares = {1: 0.25 * 0.75, 2: 0.25 * 0.25, 3: 0.75}  # as often as they are trained on, however long a set is
    data = open_data(spec(tmp_path, {"a": 1, "b": 3}), train(), 257)
    assert data.unigram_entropy == pytest.approx(-sum(share * math.log(share) for share in shares.values()))
    alone = [open_data(spec(tmp_path, {name: 1}), train(), 257).fingerprint for name in ("a", "b")]
    assert len({data.fingerprint, *alone}) == 3


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (
            257,
            r"model\.vocab=257: token 105 of .*set\.bin, in document 2, is 257, and .* up to 256; nearest valid: 258",
        ),
        (2**31 - 1, "is 2147483647"),
        (-1, r"data\.indexed=.*token 105 .*in document 2, is -1, and ids count from 0"),
    ],
)
def test_an_id_that_the_model_has_not_is_found(tmp_path: Path, token: int, said: str) -> None:
    write(tmp_path / "set", [[1] * 50, [2] * 50, [3] * 5 + [token] + [256]], np.int32)
    with pytest.raises(InputError, match=said):
        open_data(spec(tmp_path, {"set": 1}), train(), 257)
    assert [at.suffix for at in (tmp_path / "cache").iterdir()] == [".lock"]
    if token == 257:
        assert open_data(spec(tmp_path, {"set": 1}), train(), 258).train_tokens == 107
        with pytest.raises(InputError, match="in document 2"):
            open_data(spec(tmp_path, {"set": 1}), train(), 257)


def test_of_a_very_large_set_a_part_is_looked_at_and_the_rest_as_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "PIECE", 10)
    monkeypatch.setattr(token_cache, "MOST_PIECES", 3)
    write(tmp_path / "set", [[1] * 10, [2] * 10, [3] * 9 + [400], [1] * 15])  # pieces 0, 2 and 4
    with pytest.raises(InputError, match=r"token 29 .* in document 2, is 400"):
        open_data(spec(tmp_path, {"set": 1}), train(), 257)
    write(tmp_path / "set", [[1] * 10, [2] * 9 + [400], [3] * 10, [1] * 15])
    data = open_data(spec(tmp_path, {"set": 1}), train(5, 8), 257)
    assert data.unigram_entropy == pytest.approx(-0.6 * math.log(0.6) - 0.4 * math.log(0.4))
    with pytest.raises(InputError, match=r"token 19 .* in document 1, is 400"):
        data.batches(1, 0, 1, 8)


def test_changed_files_are_looked_through_again(tmp_path: Path) -> None:
    write(tmp_path / "set", [[1] * 50])
    before = open_data(spec(tmp_path, {"set": 1}), train(), 257)
    write(tmp_path / "set", [[2] * 50])
    os.utime(tmp_path / "set.bin", (1, 1))
    assert open_data(spec(tmp_path, {"set": 1}), train(), 257).fingerprint != before.fingerprint
    os.truncate(tmp_path / "set.bin", 99)
    with pytest.raises(InputError, match=r"set\.bin is truncated: it ends at byte 99, .* 100"):
        open_data(spec(tmp_path, {"set": 1}), train(), 257)
    (tmp_path / "set.bin").unlink()
    with pytest.raises(InputError, match=r"there is no .*set\.bin"):
        open_data(spec(tmp_path, {"set": 1}), train(), 257)
