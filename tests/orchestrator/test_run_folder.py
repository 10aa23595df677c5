"""The run folder, on a disk and at a URL: what is written is whole, and what is not a run is not found."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from sample_runs import make_run

from jobs.errors import InputError
from orchestrator import run_folder
from orchestrator.run_folder import RunFolder, find_run, new_run_id, runs


@pytest.fixture
def run(root: str) -> RunFolder:
    folder = RunFolder(f"{root}/some-run")
    folder.write("job.json", b"{}")
    return folder


def refused(root: str, run: str) -> InputError:
    with pytest.raises(InputError) as caught:
        find_run(root, run)
    return caught.value


# Files.


def test_what_is_written_is_read(run: RunFolder) -> None:
    run.write("a/b/c.bin", bytes(range(256)))
    run.write_json("status.json", {"state": "done"})
    assert run.read("a/b/c.bin") == bytes(range(256))
    with run.open("a/b/c.bin") as file:
        assert file.read(3) == b"\0\1\2"
    assert run.read_json("status.json") == {"state": "done"}
    assert run.read("status.json").endswith(b"}\n")
    assert (run.size("a/b/c.bin"), run.exists("a/b/c.bin"), run.exists("a/b")) == (256, True, True)


def test_what_is_not_there(run: RunFolder) -> None:
    assert run.read_json("none.json") is None
    assert list(run.read_lines("none.jsonl")) == []
    assert run.size("none.bin") is None
    assert run.names("none") == []
    assert not run.exists("none.json")
    run.remove("none")
    with pytest.raises(FileNotFoundError):
        run.read("none.bin")


def test_names_are_those_directly_below_sorted(run: RunFolder) -> None:
    for name in ("logs/attempt-2/rank-0.log", "logs/attempt-1/rank-1.log", "logs/attempt-1/rank-0.log"):
        run.write(name, b"")
    assert run.names("logs") == ["attempt-1", "attempt-2"]
    assert run.names("logs/attempt-1") == ["rank-0.log", "rank-1.log"]
    assert run.names("") == ["job.json", "logs"]


def test_removing_a_file_and_a_folder(run: RunFolder) -> None:
    run.write("checkpoints/step-1/model/a", b"a")
    run.write("checkpoints/step-2/model/a", b"a")
    run.remove("checkpoints/step-1")
    assert run.names("checkpoints") == ["step-2"]
    run.remove("checkpoints/step-2/model/a")
    assert not run.exists("checkpoints/step-2/model/a")
    assert run.exists("job.json")


def test_upload_and_download(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"text")
    run.upload(tmp_path / "here", "rank-0.log")
    run.download("rank-0.log", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"text"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_file_that_is_not_json_is_named(run: RunFolder, content: bytes) -> None:
    run.write("status.json", content)
    with pytest.raises(InputError, match="is not JSON") as caught:
        run.read_json("status.json")
    assert caught.value.path == run.path("status.json")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(str(tmp_path))
    run.write("status.json", b"whole")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.write("status.json", b"cut")
    assert run.read("status.json") == b"whole"


# Lines.


def test_lines_are_read_by_who_appended_them_before_they_are_written_out(run: RunFolder) -> None:
    for step in (1, 2, 3):
        run.append("metrics.jsonl", [{"step": step}])
        assert [line["step"] for line in run.read_lines("metrics.jsonl")] == list(range(1, step + 1))


def test_appending_adds_lines(run: RunFolder) -> None:
    run.append("metrics.jsonl", [{"step": 1}, {"step": 2}])
    run.append("metrics.jsonl", [])
    run.append("metrics.jsonl", [{"step": 3, "loss": float("nan")}])
    run.flush()
    another = RunFolder(run.place)
    another.append("metrics.jsonl", [{"step": 4}])
    another.flush()
    lines = list(another.read_lines("metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2]["loss"] != lines[2]["loss"]


def test_a_last_line_cut_short_is_left_out(run: RunFolder) -> None:
    run.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in run.read_lines("metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("before", [b"", b'{"step": 1}\n', b'{"step": 1}\n{"ste', b'{"st'])
def test_a_line_after_one_cut_short_can_be_read(tmp_path: Path, before: bytes) -> None:
    run = RunFolder(str(tmp_path))
    run.write("metrics.jsonl", before)
    run.append("metrics.jsonl", [{"step": 2}])
    assert run.read("metrics.jsonl") == before[: before.rfind(b"\n") + 1] + b'{"step": 2}\n'


def test_a_line_that_is_not_json_is_named_by_its_number(run: RunFolder) -> None:
    run.write("events.jsonl", b'{"kind": "a"}\nrubbish\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        list(run.read_lines("events.jsonl"))


def test_an_object_store_is_rewritten_now_and_then(monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    if "memory:" not in root:
        root = f"memory://{root}"
    now = 100.0
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now)
    run, reader = RunFolder(f"{root}/run"), RunFolder(f"{root}/run")

    def steps() -> list[int]:
        return [line["step"] for line in reader.read_lines("metrics.jsonl")]

    run.append("metrics.jsonl", [{"step": 1}])
    assert steps() == [1]
    now = 101.0
    run.append("metrics.jsonl", [{"step": 2}])
    run.flush(5.0)
    assert steps() == [1]
    assert [line["step"] for line in run.read_lines("metrics.jsonl")] == [1, 2]  # who holds lines back knows them
    now = 102.1
    run.append("metrics.jsonl", [{"step": 3}])
    assert steps() == [1, 2, 3]
    run.append("metrics.jsonl", [{"step": 4}])
    run.flush()
    assert steps() == [1, 2, 3, 4]


# Runs.


def test_run_ids_are_ids_and_differ() -> None:
    ids = {new_run_id("quickstart") for _ in range(20)}
    assert len(ids) == 20
    assert all(run_folder.RUN_ID.fullmatch(each) for each in ids)


def test_runs_are_listed_newest_first_and_nothing_else_is(root: str) -> None:
    for name, created in (("b-old", 1.0), ("a-new", 3.0), ("c-mid", 2.0)):
        make_run(f"{root}/{name}", created_at=created)
    RunFolder(f"{root}/no-job").write("plan.json", b"{}")
    RunFolder(f"{root}/.hidden").write("job.json", b"{}")
    assert [run.run_id for run in runs(root)] == ["a-new", "c-mid", "b-old"]
    assert find_run(root, "last").run_id == "a-new"


def test_there_are_no_runs_where_there_is_no_root(root: str) -> None:
    assert runs(root) == []
    assert str(refused(root, "last")).startswith(f"run=last: there is no run under {root}")


def test_a_run_is_found_by_its_id_and_by_its_place(root: str) -> None:
    made = make_run(f"{root}/quick-1")
    for where, run in ((root, "quick-1"), (f"{root}/", "quick-1"), ("elsewhere", made.place)):
        found = find_run(where, run)
        assert (found.run_id, found.place) == ("quick-1", made.place)
    assert [run.place for run in runs(f"{root}/")] == [made.place]


def test_an_unknown_run_names_the_nearest(root: str) -> None:
    make_run(f"{root}/quick-1")
    assert refused(root, "quick-2").nearest == "quick-1"
    assert refused(root, "zzz").nearest is None
    assert refused(root, f"{root}/quick-2").nearest is None


@pytest.mark.parametrize("run", ["", ".", "..", "-f", "Quick", "a b", "a\nb", "a.b", "x" * 200])
def test_what_is_no_run_id_is_refused(root: str, run: str) -> None:
    assert "is not a run id" in refused(root, run).rule


def test_an_id_cannot_leave_the_run_root_but_a_path_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(str(tmp_path / "elsewhere" / "quick-1"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert find_run("runs", "../elsewhere/quick-1").place == str(tmp_path / "elsewhere" / "quick-1")
    assert "there is no such run under" in refused(str(tmp_path / "elsewhere" / "runs"), "../quick-1").rule
    assert list((tmp_path / "here").iterdir()) == []


def test_places_are_made_absolute_and_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert RunFolder("runs/a").local == tmp_path / "runs" / "a"
    assert RunFolder("~/runs/a").local == tmp_path / "home" / "runs" / "a"
    assert RunFolder(f"file://{tmp_path}/a").local == tmp_path / "a"
    assert RunFolder("memory://runs/a/").place == "memory://runs/a"
    assert RunFolder("memory://runs/a/").local is None


@pytest.mark.parametrize(
    ("root", "rule"),
    [
        ("bogus://bucket/runs", "cannot be opened: Protocol not known: bogus"),
        ("http://127.0.0.1:1/runs", "cannot be read: "),
    ],
)
def test_a_root_that_cannot_be_reached_is_said_in_one_line(root: str, rule: str) -> None:
    calls: list[Any] = [lambda: runs(root), lambda: find_run(root, "last"), lambda: find_run(root, "quick-1")]
    for call in calls:
        with pytest.raises(InputError, match=re.escape(rule)) as caught:
            call()
        assert caught.value.path == "run root"
        assert len(str(caught.value).splitlines()) == 1
