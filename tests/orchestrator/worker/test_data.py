"""The token cache under bad luck, the split, and an order of samples that no layout and no restart can change."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import InputError
from jobs.spec import DataSpec, TrainSpec
from orchestrator.worker.data import Data, open_data
from orchestrator.worker.order import permuted

PROCESSES = multiprocessing.get_context("fork")


def train(sequence_length: int = 8, global_batch: int = 4, **others: int) -> TrainSpec:
    fixed = {"steps": 100, "learning_rate": 1e-3, "eval_batches": 0}
    return TrainSpec(sequence_length=sequence_length, global_batch=global_batch, **{**fixed, **others})


def spec(folder: Path, pattern: str = "*.txt", **others: object) -> DataSpec:
    fixed = {"files": (f"{folder}/text/{pattern}",), "cache": str(folder / "cache"), "validation_fraction": 0}
    return DataSpec(**{**fixed, **others})


def write(folder: Path, documents: dict[str, str | bytes]) -> None:
    (folder / "text").mkdir(exist_ok=True)
    for name, text in documents.items():
        (folder / "text" / name).write_bytes(text.encode() if isinstance(text, str) else text)


def cached(folder: Path) -> Path:
    """The one whole cache in a folder."""
    (found,) = (at for at in (folder / "cache").iterdir() if at.is_dir())
    return found


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document of random bytes, in which no two windows are alike."""
    folder = tmp_path_factory.mktemp("prose")
    write(folder, {"a.txt": random.Random(0).randbytes(3000)})
    return folder


def rows(data: Data, step: int, dp: int, micro_batch: int, global_batch: int) -> np.ndarray:
    """A step's windows as [global_batch, sequence_length + 1], put together from all ranks by the sample index."""
    whole: list[np.ndarray | None] = [None] * global_batch
    for rank in range(dp):
        for micro, batch in enumerate(data.batches(step, rank, dp, micro_batch)):
            assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape
            assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == ("int64", "int64", "float32")
            assert batch.loss_mask.all()
            assert (batch.tokens[:, 1:] == batch.labels[:, :-1]).all()
            for row in range(micro_batch):
                index = (micro * dp + rank) * micro_batch + row
                assert whole[index] is None
                whole[index] = np.append(batch.tokens[row], batch.labels[row, -1])
    assert all(row is not None for row in whole)
    return np.stack(whole)


@settings(deadline=None)
@given(
    length=st.integers(2, 40),
    dp=st.integers(1, 5),
    micro_batch=st.integers(1, 4),
    count=st.integers(1, 3),
    step=st.integers(1, 50),
    seed=st.integers(0, 2**40),
)
def test_no_layout_changes_a_step(
    prose: Path, length: int, dp: int, micro_batch: int, count: int, step: int, seed: int
) -> None:
    batch = dp * micro_batch * count
    data = open_data(spec(prose), train(length, batch, seed=seed), 257)
    parts = rows(data, step, dp, micro_batch, batch)
    assert (parts == rows(data, step, 1, 1, batch)).all()

    tokens = [*(prose / "text" / "a.txt").read_bytes(), 256]
    windows = (len(tokens) - 1) // length
    for offset, row in enumerate(parts):
        start = permuted((step - 1) * batch + offset, windows, str(seed)) * length
        assert row.tolist() == tokens[start : start + length + 1]


@settings(deadline=None, max_examples=20)
@given(length=st.integers(50, 200), seed=st.integers(0, 2**40))
def test_every_window_is_read_once_an_epoch(prose: Path, length: int, seed: int) -> None:
    tokens = [*(prose / "text" / "a.txt").read_bytes(), 256]
    windows = (len(tokens) - 1) // length
    data = open_data(spec(prose), train(length, windows, seed=seed), 257)
    every = sorted(tokens[k * length : k * length + length + 1] for k in range(windows))
    orders = [rows(data, epoch, 1, windows, windows).tolist() for epoch in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1]) == every
    assert orders[0] != orders[1]


def test_a_batch_that_ranks_cannot_share_is_an_error(prose: Path) -> None:
    data = open_data(spec(prose), train(global_batch=4), 257)
    with pytest.raises(ValueError, match=r"dp\*micro_batch=3\*1 does not divide global_batch=4"):
        data.batches(1, 0, 3, 1)


def test_the_entropy_is_of_the_training_tokens(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "abab", "b.txt": "c"})
    data = open_data(spec(tmp_path), train(2), 257)
    shares = [count / 7 for count in Counter([*b"abab", 256, *b"c", 256]).values()]
    assert data.train_tokens == 7
    assert data.unigram_entropy == pytest.approx(-sum(share * math.log(share) for share in shares))


def documents(count: int) -> dict[str, str | bytes]:
    return {f"{number}.txt": f"<{number}>" * 20 for number in range(count)}


def held_out(folder: Path, data: Data) -> set[str]:
    tokens = np.fromfile(cached(folder) / "tokens.bin", np.uint16)[data.train_tokens :]
    text = bytes(np.where(tokens < 256, tokens, 10).astype(np.uint8)).decode()
    return {line[1:].partition(">")[0] for line in text.splitlines()}


def test_whole_documents_are_held_out_by_their_name_alone(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, count in ((few, 100), (many, 200)):
        folder.mkdir()
        write(folder, documents(count))
    opened = {folder: open_data(spec(folder, validation_fraction=0.2), train(), 257) for folder in (few, many)}
    chosen = {folder: held_out(folder, data) for folder, data in opened.items()}
    assert chosen[few] == {name for name in chosen[many] if int(name) < 100}
    assert 0.1 < opened[many].validation_tokens / (opened[many].train_tokens + opened[many].validation_tokens) < 0.3
    assert opened[many].validation_tokens == sum(len(f"<{name}>") * 20 + 1 for name in chosen[many])


def test_few_documents_are_split_at_their_end(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "x" * 899, "b.txt": "y" * 99})
    data = open_data(spec(tmp_path, validation_fraction=0.1), train(eval_batches=1), 257)
    assert (data.train_tokens, data.validation_tokens) == (900, 100)
    seen = {int(token) for batch in data.validation_batches(0, 0, 1, 1) for token in batch.tokens.flat}
    assert seen == {ord("y")}


def test_validation_is_shared_among_ranks_and_does_not_depend_on_the_seed(prose: Path) -> None:
    split = spec(prose, validation_fraction=0.5)
    one, two = (open_data(split, train(global_batch=4, eval_batches=2, seed=seed), 257) for seed in (1, 2))
    whole = np.concatenate([batch.tokens for batch in one.validation_batches(1, 0, 1, 2)])
    parts = [two.validation_batches(1, rank, 2, 1) for rank in (0, 1)]
    assert (whole == np.concatenate([parts[rank][micro].tokens for micro in (0, 1) for rank in (0, 1)])).all()
    assert open_data(spec(prose), train(), 257).validation_batches(0, 0, 1, 1) == []


def test_a_split_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "x" * 99})
    open_data(spec(tmp_path), train(99), 257)
    with pytest.raises(InputError, match="window of 101 tokens does not fit into the 100 training tokens") as caught:
        open_data(spec(tmp_path), train(100), 257)
    assert caught.value.nearest == 99
    with pytest.raises(InputError, match="into the 10 validation tokens"):
        open_data(spec(tmp_path, validation_fraction=0.1), train(10, eval_batches=1), 257)
    open_data(spec(tmp_path, validation_fraction=0.1), train(10, eval_batches=0), 257)


def word_level(folder: Path, vocabulary: dict[str, int]) -> str:
    file = folder / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"}
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content = {"version": "1.0", "truncation": truncation, "padding": None, "added_tokens": [], "normalizer": None}
    content |= {"pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": model}
    file.write_text(json.dumps(content))
    return str(file)


@pytest.mark.parametrize(("largest", "width"), [(65_535, 2), (65_536, 4)])
def test_a_tokenizers_file_is_used(tmp_path: Path, largest: int, width: int) -> None:
    write(tmp_path, {"a.txt": b"one two one two one", "b.txt": b"two \xff\xfe two"})
    tokenizer = word_level(tmp_path, {"?": 0, "one": 1, "two": largest, "<|endoftext|>": 3, "\ufffd\ufffd": 4})
    data = spec(tmp_path, tokenizer=tokenizer)
    (batch,) = open_data(data, train(9, 1), largest + 1).batches(1, 0, 1, 1)
    assert batch.tokens[0].tolist() == [1, largest, 1, largest, 1, 3, largest, 4, largest]
    assert batch.labels[0, -1] == 3
    assert (cached(tmp_path) / "tokens.bin").stat().st_size == width * 10
    with pytest.raises(InputError, match=rf"model\.vocab={largest}: .* ids up to {largest}"):
        open_data(data, train(9, 1), largest)


def test_what_the_tokenizers_library_refuses_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "text"})
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    with pytest.raises(InputError, match=r"data\.tokenizer=.*is no tokenizers JSON file"):
        open_data(spec(tmp_path, tokenizer=f"{tmp_path}/tokenizer.json"), train(), 300)


def test_text_without_a_token_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": " \n"})
    data = spec(tmp_path, tokenizer=word_level(tmp_path, {"?": 0}))
    with pytest.raises(InputError, match=r"data\.tokenizer=.* makes no token of the text of 1 files"):
        open_data(data, train(), 257)


def test_changed_text_is_tokenised_again(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "x" * 100})
    before = open_data(spec(tmp_path), train(), 257)
    write(tmp_path, {"a.txt": "y" * 100})
    os.utime(tmp_path / "text" / "a.txt", (1, 1))
    assert open_data(spec(tmp_path), train(), 257).fingerprint != before.fingerprint


@pytest.mark.parametrize(
    "harm",
    [
        lambda cache: os.truncate(cache / "tokens.bin", 50),
        lambda cache: (cache / "tokens.bin").unlink(),
        lambda cache: (cache / "index.json").unlink(),
        lambda cache: (cache / "index.json").write_text('{"tokens": 10'),
        lambda cache: (cache / "index.json").write_text('{"tokens": 10}'),
        lambda cache: os.truncate(cache / "ends.npy", 130),
        lambda cache: (cache / "counts.npy").unlink(),
    ],
)
def test_a_harmed_cache_is_built_again(tmp_path: Path, harm: Callable[[Path], object]) -> None:
    write(tmp_path, {"a.txt": "x" * 100})
    before = open_data(spec(tmp_path), train(), 257)
    harm(cached(tmp_path))
    after = open_data(spec(tmp_path), train(), 257)
    assert (after.fingerprint, after.train_tokens) == (before.fingerprint, 101)
    assert (cached(tmp_path) / "tokens.bin").stat().st_size == 202


def test_text_that_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, {})
    archive = tmp_path / "text" / "books.zip"
    with zipfile.ZipFile(archive, "w") as books:
        books.writestr("one.txt", "a good one")
        books.writestr("two.txt", "a torn one")
    archive.write_bytes(archive.read_bytes().replace(b"a torn one", b"a TORN one"))
    with pytest.raises(InputError, match=r"two\.txt.*: cannot be read: BadZipFile"):
        open_data(spec(tmp_path, files=(f"zip://*.txt::file://{archive}",)), train(2), 257)
    assert [at.suffix for at in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "x" * 100})
    with pytest.raises(InputError, match=r"data\.cache=.*cannot be written"):
        open_data(spec(tmp_path, cache=f"{tmp_path}/text/a.txt/cache"), train(), 257)


def test_without_a_folder_of_its_own_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.txt": "x" * 100})
    for variable, value, below in (("XDG_CACHE_HOME", "xdg", "xdg"), ("HOME", "home", "home/.cache")):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv(variable, str(tmp_path / value))
        open_data(spec(tmp_path, cache=None), train(), 257)
        assert len(list((tmp_path / below / "fivefold" / "tokens").glob("*/tokens.bin"))) == 1


def die_at(event: str, name: str) -> None:
    """Kill this process, as the kernel would, at its first use of a path that ends in `name`."""

    def hook(seen: str, arguments: tuple[object, ...]) -> None:
        if seen == event and str(arguments[0]).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize(
    ("event", "name"),
    [("open", ".partial/tokens.bin"), ("open", ".partial/index.json"), ("os.rename", ".partial")],
)
def test_a_builder_that_is_killed_leaves_nothing_or_a_whole_cache(tmp_path: Path, event: str, name: str) -> None:
    write(tmp_path, {"a.txt": "x" * 100})

    def build() -> None:
        die_at(event, name)
        open_data(spec(tmp_path), train(), 257)

    builder = PROCESSES.Process(target=build)
    builder.start()
    builder.join(30)
    assert builder.exitcode == -signal.SIGKILL
    assert [at.suffix for at in sorted((tmp_path / "cache").iterdir())] == [".lock", ".partial"]

    assert open_data(spec(tmp_path), train(), 257).train_tokens == 101
    assert sorted(at.suffix for at in (tmp_path / "cache").iterdir()) == ["", ".lock"]


def test_of_many_processes_one_builds(tmp_path: Path) -> None:
    write(tmp_path, {f"{number}.txt": random.Random(number).randbytes(20_000) for number in range(50)})
    start, seen = PROCESSES.Barrier(6), PROCESSES.SimpleQueue()

    def read() -> None:
        built = []
        sys.addaudithook(lambda event, _: built.append(event) if event == "os.rename" else None)
        start.wait(30)
        data = open_data(spec(tmp_path), train(), 257)
        seen.put((len(built), data.fingerprint, data.batches(3, 0, 1, 4)[0].tokens.tolist()))

    readers = [PROCESSES.Process(target=read) for _ in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0] * 6
    results = [seen.get() for _ in readers]
    assert sum(built for built, _, _ in results) == 1
    assert all(result[1:] == results[0][1:] for result in results)
