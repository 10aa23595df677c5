"""What text a job names, and what is said of text that cannot be used."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import yaml

from jobs import corpus
from jobs.errors import CombinedInputError, InputError
from jobs.spec import DataSpec, TrainSpec

STDLIB = Path(corpus.__file__).parent / "conf" / "data" / "stdlib.yaml"
TRAIN = TrainSpec(steps=1, sequence_length=8, global_batch=1, learning_rate=1e-3)


def spec(*files: object, tokenizer: object = "bytes") -> DataSpec:
    return DataSpec(files=tuple(map(str, files)), tokenizer=str(tokenizer))


def refusal(data: DataSpec) -> InputError:
    with pytest.raises(InputError) as caught:
        corpus.check(data, TRAIN)
    return caught.value


@contextlib.contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder that an ordinary user can reach; rights dropped within are given back."""
    fsspec.filesystem("file")  # imported while this process may still read where it is installed
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    user = os.geteuid()
    try:
        yield folder
    finally:
        os.seteuid(user)
        for at, _, _ in os.walk(folder):
            Path(at).chmod(0o755)
        shutil.rmtree(folder)


def drop_rights() -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_the_default_corpus_is_the_library_and_nothing_installed_or_tested() -> None:
    data = DataSpec(**yaml.safe_load(STDLIB.read_text()))
    files = corpus.resolve(data)
    names = [file.name for file in files]
    assert {"stdlib:ast.py", "stdlib:json/decoder.py"} <= set(names)
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]
    assert names == sorted(names)
    assert 8e6 < sum(file.size_bytes for file in files) < 40e6
    corpus.check(data, TRAIN)


def test_globs_are_sorted_by_the_name_below_their_folder_and_read_once(tmp_path: Path) -> None:
    for folder, name in (("a", "z.txt"), ("b", "m.txt"), ("b/deep", "k.txt")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(name)
    files = corpus.resolve(spec(tmp_path / "b/**/*.txt", tmp_path / "a" / "*.txt", tmp_path / "b" / "m.txt"))
    assert [file.name for file in files] == ["deep/k.txt", "m.txt", "z.txt"]
    assert [file.size_bytes for file in files] == [5, 5, 5]
    with files[0].open() as stream:
        assert stream.read() == b"k.txt"


def test_a_chained_url_reads_from_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "books.zip", "w") as archive:
        archive.writestr("one.txt", "first")
        archive.writestr("two.txt", "second")
    files = corpus.resolve(spec(f"zip://*.txt::file://{tmp_path}/books.zip"))
    assert [file.url for file in files] == [
        f"zip://{name}::file://{tmp_path}/books.zip" for name in ("one.txt", "two.txt")
    ]
    with files[1].open() as stream:
        assert stream.read() == b"second"


def test_a_pattern_without_a_match_is_named_with_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("Now is the winter")
    error = refusal(spec(tmp_path / "shakespear.txt"))
    assert (error.path, error.value) == ("data.files", str(tmp_path / "shakespear.txt"))
    assert error.nearest == str(tmp_path / "shakespeare.txt")
    assert "matches nothing" in str(refusal(spec(tmp_path / "*.md")))
    assert f"no folder {tmp_path}/none/" in str(refusal(spec(tmp_path / "none" / "*.md")))
    assert refusal(spec("stdlib:none/*.py")).nearest == "stdlib:**/*.py"


def test_a_folder_is_not_text(tmp_path: Path) -> None:
    assert refusal(spec(tmp_path)).nearest == f"{tmp_path}/**"


def test_every_bad_pattern_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text")
    error = refusal(spec(tmp_path / "a.txt", tmp_path / "good.txt", tmp_path / "b.txt"))
    assert isinstance(error, CombinedInputError)
    assert [each.value for each in error.errors] == [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_empty_text_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    assert "2 files, all of 0 bytes" in str(refusal(spec(tmp_path / "*.txt")))


def test_a_file_or_folder_without_permission_is_unreadable_not_missing() -> None:
    with as_nobody() as folder:
        (folder / "locked").mkdir()
        (folder / "locked" / "a.txt").write_text("text")
        (folder / "b.txt").write_text("text")
        (folder / "b.txt").chmod(0)
        (folder / "locked").chmod(0)
        drop_rights()
        for pattern in (folder / "b.txt", folder / "locked" / "*.txt"):
            assert "cannot be read: PermissionError" in str(refusal(spec(pattern)))


def test_a_missing_bucket_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as on a machine without it
    error = refusal(spec("gs://bucket/*.txt"))
    assert error.value == "gs://bucket/*.txt"
    assert "gcsfs" in str(error)


def test_an_unknown_protocol_has_a_nearest_one() -> None:
    assert refusal(spec("filee:///a.txt")).nearest == "file://"


def test_an_address_that_does_not_answer_is_unreadable() -> None:
    assert "cannot be read" in str(refusal(spec("http://127.0.0.1:9/a.txt")))


def test_a_tokenizer_is_read_before_anything_is_made(tmp_path: Path) -> None:
    text, file = tmp_path / "a.txt", tmp_path / "tokenizer.json"
    text.write_text("text")
    assert "FileNotFoundError" in str(refusal(spec(text, tokenizer=file)))
    for content in ("not json", "[]", json.dumps({"model": {"vocab": {}}}), json.dumps({"model": {"vocab": 3}})):
        file.write_text(content)
        error = refusal(spec(text, tokenizer=file))
        assert (error.path, error.value) == ("data.tokenizer", str(file))


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ({"model": {"vocab": {"a": 0, "b": 6}}}, 7),
        ({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}, 2),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 9, "content": "</s>"}]}, 10),
    ],
)
def test_a_vocabulary_counts_its_largest_id(tmp_path: Path, content: object, size: int) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    data = spec("unread", tokenizer=tmp_path / "tokenizer.json")
    assert corpus.vocabulary_size(data) == size
    corpus.check_vocabulary(data, size)
    with pytest.raises(InputError, match=f"ids up to {size - 1}") as caught:
        corpus.check_vocabulary(data, size - 1)
    assert (caught.value.path, caught.value.nearest) == ("model.vocab", size)


def test_bytes_need_the_separator_too() -> None:
    corpus.check_vocabulary(spec("unread"), 257)
    with pytest.raises(InputError, match="256 bytes and a document separator"):
        corpus.check_vocabulary(spec("unread"), 256)
