"""What a person sees of a run, in a file as in a pipe: every line is the same wherever it is read."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from sample_runs import job, metrics_line

from orchestrator.control import display as module
from orchestrator.control.display import Display, bytes_text
from orchestrator.messages import Event

HEADER = "   step      loss  grad norm   tokens/s    MFU    memory"


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


def training_started(start_step: int = 0, init_from: str | None = None, from_memory: bool = False) -> Event:
    data = {"start_step": start_step, "init_from": init_from, "parameters": 1_234_567, "unigram_entropy": 3.2}
    data["from_memory"] = from_memory
    return Event(kind="training_started", message="", data=data)


def test_the_opening_says_what_is_trained_where(shown: io.StringIO) -> None:
    Display(shown).opening("/runs/quick-1", job(), "tp2 dp2 ep2 on 4 cpu ranks")
    assert shown.getvalue().splitlines() == [
        "run     /runs/quick-1",
        "model   quickstart: 4 layers, hidden 128, 4 experts, top 2",
        "layout  tp2 dp2 ep2 on 4 cpu ranks",
        "train   100 steps, 16 x 128 tokens a step, fp32",
    ]


def test_steps_are_aligned_under_their_header(shown: io.StringIO) -> None:
    display = Display(shown)
    display(training_started())
    display(metrics_line(1, loss=5.5, grad_norm=12.25, memory_bytes=310_400_000))
    display(metrics_line(9999999, loss=0.125, mfu=0.4567, tokens_per_second=1234567.8, memory_bytes=79.5e9))
    display(metrics_line(3, loss=float("nan"), grad_norm=float("inf"), validation_loss=2.5))
    assert shown.getvalue().splitlines() == [
        "        1.23 M parameters, from random weights",
        HEADER,
        "      1    5.5000    12.2500      4,096      -    310 MB",
        "9999999    0.1250     1.5000  1,234,568  45.7%  79.50 GB",
        "      3       nan        inf      4,096      -    300 MB  validation 2.5000",
    ]


def test_weights_that_were_read_are_told_of(shown: io.StringIO) -> None:
    Display(shown)(training_started(init_from="/weights/mixtral"))
    assert shown.getvalue() == "        1.23 M parameters, from /weights/mixtral\n"


def test_a_state_that_was_kept_in_memory_is_told_of(shown: io.StringIO) -> None:
    Display(shown)(training_started(start_step=30, from_memory=True))
    assert shown.getvalue() == "        1.23 M parameters, from the snapshot in memory of step 30\n"


def test_a_recovery_is_told_as_it_happens_and_the_header_repeated(shown: io.StringIO) -> None:
    display = Display(shown)
    display(training_started())
    display(metrics_line(1))
    for kind, message in {
        "rank_started": "rank 0 started as pid 7",
        "fault_injected": "rank 1 kills itself at step 2",
        "rank_exited": "rank 1 was ended by SIGKILL",
        "attempt_failed": "step 1: rank 1 was ended by SIGKILL",
        "restarting": "restart 1 of at most 3",
        "checkpoint_written": "checkpoint at step 1",
    }.items():
        display(Event(kind=kind, message=message))
    display(training_started(start_step=1))
    display(metrics_line(2))
    display(metrics_line(3))
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "HH:MM:SS ", line) for line in shown.getvalue().splitlines()]
    assert lines[3:8] == [
        "HH:MM:SS  rank 1 kills itself at step 2",
        "HH:MM:SS  step 1: rank 1 was ended by SIGKILL",
        "HH:MM:SS  restart 1 of at most 3",
        "        1.23 M parameters, from the checkpoint of step 1",
        HEADER,
    ]
    assert [line.split()[0] for line in lines[8:]] == ["2", "3"]


def test_what_ranks_say_is_not_taken_for_markup_nor_broken_into_lines(shown: io.StringIO) -> None:
    text = "[bold]rank[/bold] 3 failed: [red" + 300 * "x"
    Display(shown)(Event(kind="attempt_failed", message=text))
    assert shown.getvalue().endswith(f"  {text}\n")


FACTS: dict[str, Any] = {
    "state": "done",
    "reason": "trained 100 steps",
    "loss_first": 5.6,
    "loss_last": 2.25,
    "validation_loss": 2.3125,
    "unigram_entropy": 3.25,
    "ledger": {"productive": 20.0, "restart": 4.5},
    "overall": {"goodput": 0.8163, "tokens_per_second": 9120.4, "mfu": 0.31},
    "run_folder": "/runs/quick-1",
    "loss_plot": "/runs/quick-1/loss.png",
}


def test_the_summary(shown: io.StringIO) -> None:
    Display(shown).summary(FACTS)
    assert shown.getvalue().splitlines() == [
        "",
        "done: trained 100 steps",
        "loss    5.6000 -> 2.2500, under the text's unigram entropy of 3.2500 nats",
        "        2.3125 on text held out of training",
        "seconds productive 20.0  restart 4.5  = 24.5",
        "goodput 81.6%, 9,120 tokens/s, MFU 31.0% over all its time",
        "folder  /runs/quick-1  (loss.png has the curve)",
    ]


def test_the_summary_of_a_run_that_never_trained(shown: io.StringIO) -> None:
    nothing = dict.fromkeys(("loss_first", "loss_last", "validation_loss", "unigram_entropy", "loss_plot"))
    Display(shown).summary(FACTS | nothing | {"state": "failed", "reason": "no devices within 3 s"})
    assert shown.getvalue().splitlines() == [
        "",
        "failed: no devices within 3 s",
        "seconds productive 20.0  restart 4.5  = 24.5",
        "goodput 81.6%, 9,120 tokens/s, MFU 31.0% over all its time",
        "folder  /runs/quick-1",
    ]


def test_a_loss_above_the_entropy_is_called_so(shown: io.StringIO) -> None:
    Display(shown).summary(FACTS | {"loss_last": 3.5})
    assert "3.5000, above the text's unigram entropy" in shown.getvalue()


def test_on_a_terminal_a_bar_stands_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    display = Display(terminal)
    display.opening("/runs/quick-1", job(), "one rank")
    display(training_started())
    display(metrics_line(37))
    display.close()
    display.summary(FACTS)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "37/100" in plain
    assert "done: trained 100 steps" in plain


@pytest.mark.parametrize(("size", "text"), [(0, "0 MB"), (999e6, "999 MB"), (1e9, "1.00 GB"), (141e9, "141.00 GB")])
def test_sizes(size: float, text: str) -> None:
    assert bytes_text(size) == text


def test_tables_are_not_cut_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    module.print_table(None, [("name", False), ("count", True)], [["x" * 100, "1"], ["y", "1,000"]])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "name" + " " * 98 + "count",
        "x" * 100 + " " * 6 + "1",
        "y" + " " * 101 + "1,000",
    ]
