"""Reading a run's logs, while it goes on and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sample_runs import change_json, event_line, make_run, metrics_line

from jobs.errors import InputError
from orchestrator.control import follow
from orchestrator.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(str(tmp_path / "quick-1"))


@pytest.fixture
def while_waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`while_waiting(first, second, ...)`: what happens to the run each time that its reader pauses."""

    def script(*happenings: Callable[[], None]) -> None:
        left = list(happenings)
        monkeypatch.setattr(follow.time, "sleep", lambda seconds: left.pop(0)())

    return script


def test_a_ranks_newest_log(run: RunFolder) -> None:
    assert follow.log_file(run, None) == "logs/attempt-1/rank-0.log"  # not begun
    for attempt in (2, 9, 10):
        run.write(f"logs/attempt-{attempt}/rank-0.log", b"")
    run.write("logs/attempt-9/rank-3.log", b"")
    run.write("logs/.DS_Store", b"")
    assert follow.log_file(run, None) == follow.log_file(run, 0) == "logs/attempt-10/rank-0.log"
    assert follow.log_file(run, 3) == "logs/attempt-9/rank-3.log"


@pytest.mark.parametrize(("rank", "nearest"), [(4, 3), (99, 3), (-1, 0)])
def test_a_rank_that_there_is_not(run: RunFolder, rank: int, nearest: int) -> None:
    with pytest.raises(InputError) as caught:
        follow.log_file(run, rank)
    assert (caught.value.path, caught.value.value, caught.value.nearest) == ("--rank", rank, nearest)
    assert caught.value.rule == "quick-1 has ranks 0..3"


def test_a_log_is_read_whatever_is_in_it(run: RunFolder) -> None:
    run.write("logs/attempt-1/rank-0.log", b"one\n\xff two\nthree")
    assert follow.lines(run, "logs/attempt-1/rank-0.log") == ["one", "\ufffd two", "three"]
    assert follow.lines(run, "logs/attempt-1/rank-1.log") == []


def test_steps_and_events_are_told_in_the_order_in_which_they_happened(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.append("metrics.jsonl", [metrics_line(1), metrics_line(2), metrics_line(2, attempt=2, at=1_000_005.0)])
    run.append("events.jsonl", [event_line("attempt_failed", "step 2: rank 1 died", at=1_000_003.0)])
    follow.print_log(run, None, follow=False)
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [words[0] for words in told if words[0] != "step"][:2] == ["1", "2"]
    assert told[3][1:] == ["step", "2:", "rank", "1", "died"]
    assert [words[0] for words in told[4:]] == ["step", "2"]


def test_a_run_is_followed_to_its_end(
    run: RunFolder, while_waiting: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(run, "status.json", state="running")
    run.append("metrics.jsonl", [metrics_line(1)])

    def ends() -> None:
        run.append("metrics.jsonl", [metrics_line(3)])
        change_json(run, "status.json", state="done")

    while_waiting(lambda: run.append("metrics.jsonl", [metrics_line(2)]), ends)
    follow.print_log(run, None, follow=True)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "1", "2", "3"]


def test_a_rank_is_followed_into_its_next_attempt(
    run: RunFolder, while_waiting: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(run, "status.json", state="running")
    run.write("logs/attempt-1/rank-2.log", b"one\n")

    def ends() -> None:
        run.write("logs/attempt-2/rank-2.log", b"three\nfour\n")
        change_json(run, "status.json", state="done")

    while_waiting(
        lambda: run.write("logs/attempt-1/rank-2.log", b"one\ntwo\n"),
        lambda: run.write("logs/attempt-2/rank-2.log", b"three\n"),
        ends,
    )
    follow.print_log(run, 2, follow=True)
    assert capsys.readouterr().out.split() == ["one", "two", "three", "four"]
